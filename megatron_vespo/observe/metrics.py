"""Metrics that carry their own denominator: sums are added over any split and divided once, at the end.

An unweighted mean of per-micro-batch means depends on how the mini-batch was cut, and counts a micro-batch that has no
negative response as 0 (the published code's metrics do both, vespo.md 5.7). Plain floats, so that sums cross process
borders as JSON. The names follow the objectives': ``x/mean`` and ``x/mean_square`` share a denominator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class MetricSums:
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum, denominator)."""
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, denominator: float = 1.0) -> None:
        old_total, old_denominator = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_total + total, old_denominator + denominator)

    def add_values(self, name: str, values: Iterable[float]) -> None:
        """Add one observation each; with no values the metric has denominator 0, hence no mean."""
        values = [float(value) for value in values]
        self.add(name, math.fsum(values), float(len(values)))

    def add_moments(self, name: str, values: Iterable[float]) -> None:
        """``name/mean`` and ``name/mean_square`` of the values, for :meth:`means` to form std and ess from."""
        values = [float(value) for value in values]
        self.add_values(f"{name}/mean", values)
        self.add_values(f"{name}/mean_square", [value * value for value in values])

    def add_maximum(self, name: str, value: float) -> None:
        self.maxima[name] = max(value, self.maxima.get(name, -math.inf))

    def add_tensors(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """An objective's metrics: (sum, denominator) pairs of 0-d tensors, brought to the host in one transfer."""
        if not metrics:
            return
        import torch  # here, so that reading a run's metrics does not cost the import of torch

        flat = torch.stack([part.detach().double() for pair in metrics.values() for part in pair]).tolist()
        for name, total, denominator in zip(metrics, flat[0::2], flat[1::2], strict=True):
            self.add(name, total, denominator)

    def merge(self, other: MetricSums) -> None:
        """Add another part's sums: another micro-batch's, or another rank's of the CP x DP group.

        Tensor- and pipeline-parallel ranks compute the same tokens again; merge only one of them.
        """
        for name, (total, denominator) in other.sums.items():
            self.add(name, total, denominator)
        for name, value in other.maxima.items():
            self.add_maximum(name, value)

    def means(self) -> dict[str, float]:
        """Sums divided by their denominators, what follows from them, and the maxima.

        A metric whose denominator is 0 is left out: it has no value, nor is it 0. From ``x/mean`` and
        ``x/mean_square`` follow ``x/std`` (of the population) and ``x/ess`` = (sum x)^2 / (n sum x^2), the effective
        sample size of weights x (not of their logarithms) as a share of n.
        """
        means = {name: total / denominator for name, (total, denominator) in self.sums.items() if denominator}
        derived: dict[str, float] = {}
        for name, mean_square in means.items():
            quantity, _, kind = name.rpartition("/")
            if kind == "mean_square" and f"{quantity}/mean" in means:
                mean = means[f"{quantity}/mean"]
                derived[f"{quantity}/std"] = math.sqrt(max(mean_square - mean * mean, 0.0))
                if mean_square > 0 and not quantity.startswith("log_"):
                    derived[f"{quantity}/ess"] = mean * mean / mean_square
        return means | derived | self.maxima

    def to_dict(self) -> dict[str, Any]:
        return {"sums": {name: list(pair) for name, pair in self.sums.items()}, "maxima": dict(self.maxima)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MetricSums:
        return cls({name: (pair[0], pair[1]) for name, pair in state["sums"].items()}, dict(state["maxima"]))


def merged(parts: Iterable[MetricSums]) -> MetricSums:
    whole = MetricSums()
    for part in parts:
        whole.merge(part)
    return whole
