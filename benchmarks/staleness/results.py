"""What the cells came to: read from their records, put together over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.staleness.grid import UPDATES, Cell

AVERAGE = "avg@4"
SURE = 2.5
"""Standard errors from 0 at which a difference counts (Student's 95 % at five pairs is 2.8, at nine 2.3)."""
ENOUGH = 4
"""Pairs without which none does."""


@dataclass(frozen=True)
class Outcome:
    cell: Cell
    evaluations: list[tuple[int, dict[str, float]]]
    """(updates made, result)."""
    windows: list[dict[str, float]]
    """Metrics averaged over some updates each; ``updates``: made by its end."""
    phi_by_length: list[dict[str, float]]
    seconds: float

    @staticmethod
    def of(line: dict[str, Any]) -> Outcome:
        """What a cell wrote (cell.py)."""
        evaluations = [(updates, result) for updates, result in line["evaluations"]]
        name, seconds = Cell.named(line["cell"]), line["seconds"]
        return Outcome(name, evaluations, line["windows"], line["phi_by_length"], seconds)

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

    @property
    def rewards(self) -> list[tuple[int, float]]:
        """(updates made, mean training reward of the rollouts since the entry before)."""
        return [(int(window["updates"]), window["reward"]) for window in self.windows]

    @property
    def late_reward(self) -> float:
        """Mean training reward of the last quarter of the updates."""
        return mean(reward for updates, reward in self.rewards if updates > UPDATES * 3 // 4)

    @property
    def broken(self) -> bool:
        """It ends worse than it began."""
        return self.final < self.start

    @property
    def broke_at(self) -> int | None:
        """Updates made when its training reward fell below half of its best so far, for good; None: it did not."""
        best, at = 0.0, None
        for updates, reward in self.rewards:
            best = max(best, reward)
            if reward >= best / 2:
                at = None
            elif at is None:
                at = updates
        return at

    def before_and_after(self, name: str) -> tuple[float, float]:
        """Means of a metric over the first and the last eighth of the updates."""
        values = [window[name] for window in self.windows if name in window]
        part = max(1, len(values) // 8)
        return mean(values[:part]), mean(values[-part:])


def read_outcomes(file: Path) -> dict[Cell, Outcome]:
    """Of the cells that ``file`` has, a line each; {} where there is no such file."""
    if not file.is_file():
        return {}
    found = [Outcome.of(json.loads(line)) for line in file.read_text().splitlines()]
    return {outcome.cell: outcome for outcome in found}


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds, as text; one value alone has none."""
    numbers = list(values)
    if not numbers:
        return "·"
    if len(numbers) == 1:
        return f"{numbers[0]:.2f}"
    return f"{mean(numbers):.2f} ± {stdev(numbers):.2f}"


def difference(pairs: Sequence[float]) -> str:
    """Mean of paired differences ± its standard error, and how many; in bold where it is surely not 0."""
    if not pairs:
        return "·"
    if len(pairs) == 1:
        return f"{pairs[0]:+.2f} (1)"
    error = stdev(pairs) / len(pairs) ** 0.5
    text = f"{mean(pairs):+.2f} ± {error:.2f} ({len(pairs)})"
    return f"**{text}**" if len(pairs) >= ENOUGH and abs(mean(pairs)) > SURE * error else text


def chosen(outcomes: Sequence[Outcome], **wanted: str) -> list[Outcome]:
    """Those whose cells have these properties."""
    return [o for o in outcomes if all(getattr(o.cell, name) == value for name, value in wanted.items())]
