"""What the cells came to: read from their records, put together over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.staleness.cell import RESULT
from benchmarks.staleness.grid import UPDATES, Cell

AVERAGE = "avg@4"
WINDOW = 16
"""Updates over which training rewards are averaged, where a rollout batch has fewer."""


@dataclass(frozen=True)
class Outcome:
    cell: Cell
    steps: list[dict[str, Any]]
    evaluations: list[tuple[int, dict[str, float]]]
    """(updates made, result)."""
    phi_by_length: list[dict[str, float]]

    @staticmethod
    def read(root: Path, cell: Cell) -> Outcome:
        folder = root / "cells" / cell.name
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return Outcome(
            cell,
            [record for record in records if "eval" not in record],
            [(record["version"], record["eval"]) for record in records if "eval" in record],
            json.loads((folder / RESULT).read_text())["phi_by_length"],
        )

    @property
    def start(self) -> float:
        return self.evaluations[0][1][AVERAGE]

    @property
    def final(self) -> float:
        """Held-out avg@4 of the last checkpoint, not of the best."""
        return self.evaluations[-1][1][AVERAGE]

    @property
    def best(self) -> float:
        return max(result[AVERAGE] for _, result in self.evaluations)

    @cached_property
    def rewards(self) -> list[tuple[int, float]]:
        """(updates made, mean training reward of the rollouts since the entry before)."""
        found: list[tuple[int, float]] = []
        pending: list[float] = []
        for record in self.steps:
            pending.append(record["reward"])
            if record["version"] - (found[-1][0] if found else 0) >= WINDOW:
                found.append((record["version"], mean(pending)))
                pending = []
        return found

    @property
    def late_reward(self) -> float:
        """Mean training reward of the last quarter of the updates."""
        return mean(reward for version, reward in self.rewards if version > UPDATES * 3 // 4)

    @property
    def broken(self) -> bool:
        """It ends worse than it began."""
        return self.final < self.start

    @property
    def broke_at(self) -> int | None:
        """Updates made when its training reward fell below half of its best so far, for good; None: it did not."""
        best, at = 0.0, None
        for version, reward in self.rewards:
            best = max(best, reward)
            if reward >= best / 2:
                at = None
            elif at is None:
                at = version
        return at

    def before_and_after(self, name: str) -> tuple[float, float]:
        """Means of a metric over the first and the last eighth of the records."""
        values = [record[name] for record in self.steps if name in record]
        part = max(1, len(values) // 8)
        return mean(values[:part]), mean(values[-part:])


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds, as text; one value alone has none."""
    numbers = list(values)
    if not numbers:
        return "·"
    if len(numbers) == 1:
        return f"{numbers[0]:.2f}"
    return f"{mean(numbers):.2f} ± {stdev(numbers):.2f}"


def chosen(outcomes: Sequence[Outcome], **wanted: str) -> list[Outcome]:
    """Those whose cells have these properties."""
    return [o for o in outcomes if all(getattr(o.cell, name) == value for name, value in wanted.items())]
