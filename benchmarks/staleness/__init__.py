"""The staleness study: which objective still learns when its data is old (docs/study.md)."""
