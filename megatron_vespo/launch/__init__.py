"""Runs on a cluster: what is checked on its nodes, Ray on an allocation, the job scripts and manifests."""
