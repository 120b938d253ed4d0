"""Reading metrics.jsonl: one JSON object a line, a training step or an evaluation.

A step: ``{"step", "version", "time", "reward", ..., "seconds": {phase: s}}``; an evaluation: ``{"step", "eval":
{"greedy", "avg@4", "pass@4", "maj@4", "n", ...}, "intervals": {"avg@4": [low, high], ...}}``, step 0 being the policy
before training. Names of a set of evaluate.sets begin with its own, ``aime24/avg@32``. Every other key is optional.
Both may have a ``timeline``, [lane, phase, start, end] each; a step ``staleness_tokens``, {lag: tokens trained at it}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def number(record: Record, name: str) -> float | None:
    """The record's value under ``name``; None where there is no number."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def set_of(name: str) -> str:
    """The evaluation set that a name of ``eval`` belongs to; "" for data.evaluate."""
    return name.rpartition("/")[0]


def is_score(name: str) -> bool:
    """Whether a name of ``eval`` is an accuracy, rather than a count or a share of something else."""
    return name.rpartition("/")[2] not in ("n", "truncated")


def is_headline(name: str) -> bool:
    """The accuracies that are shown first: greedy and avg@k, without pass@k and maj@k beside them."""
    return is_score(name) and not name.rpartition("/")[2].startswith(("pass@", "maj@"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; [] if there is no file. A line torn by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
