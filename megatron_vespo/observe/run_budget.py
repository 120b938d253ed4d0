"""The mismatch budget of a run: what its engine's mismatch should cost, beside what its own responses had.

From the stored rollouts: of every counted token the difference log pi_old - log mu, of every response their sum, log
W_engine. Three rows for each range of lengths say what an objective would make of W_engine if it stood inside W (the
correction ``none``):

    normal     independent normal tokens of the run's k3 (objectives/budget.py)
    resampled  independent tokens drawn from the run's own: its tails, not their order
    measured   the responses as they were, with the ends of 90 % bootstrap intervals: what it has beyond ``resampled``
               is correlation along a response, or mismatch that depends on the length

phi is that of the range's mean length where an objective's depends on it, and of either sign for every response: the
mismatch does not know the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vespo.objectives.budget import (
    Budget,
    Phi,
    interval,
    measure,
    objective_phi,
    predict,
    resample_log_w,
    table_cells,
    table_head,
)
from megatron_vespo.objectives.metrics import k3
from megatron_vespo.observe.mismatch import differences
from megatron_vespo.observe.weight_health import length_bins
from megatron_vespo.samples.store import read_newest

TOKENS_ENOUGH = 1 << 22
"""Older batches are not read once the newer ones have so many response tokens."""
BINS = 5
"""Ranges of lengths, at most."""
LEVEL = 0.9
"""Of the bootstrap intervals."""

PhiOf = Callable[[float, bool], Phi]
"""(tokens, whether A >= 0) -> phi."""


@dataclass(frozen=True, slots=True)
class EngineMismatch:
    """Of a run's newest rollouts."""

    steps: list[int]
    """Those whose batches were read, ascending."""
    differences: torch.Tensor
    """[tokens] float64: log pi_old - log mu of the counted tokens."""
    lengths: np.ndarray
    """[n] counted tokens of each response that has any."""
    log_w: torch.Tensor
    """[n] float64: log W_engine."""

    @property
    def k3(self) -> float:
        """Nats a token of KL(mu || pi_old), as the metric k3_engine."""
        return float(k3(self.differences).mean())


@dataclass(frozen=True, slots=True)
class BudgetRow:
    shortest: int
    longest: int
    length: float
    """Mean tokens."""
    responses: int
    """0: a length that was asked for, not one of the run's."""
    source: str
    """normal, resampled or measured."""
    mean: float
    deviation: float
    """Of log W_engine."""
    signs: tuple[Budget, Budget] | None
    """For A >= 0 and A < 0; None: the objective has no phi(W)."""
    sign_ends: tuple[tuple[Budget, Budget], tuple[Budget, Budget]] | None = None
    """Where measured: (lower, upper) of ``signs``' bootstrap intervals."""
    deviation_ends: tuple[float, float] | None = None
    """Likewise of ``deviation``."""


def measure_mismatch(run_dir: Path) -> EngineMismatch:
    """Reads ``run_dir/rollouts``. Raises ValueError (StoreError) where there is nothing, or nothing readable."""
    folder = Path(run_dir) / "rollouts"
    batches = read_newest(folder, TOKENS_ENOUGH)
    found = differences(sample for samples in batches.values() for sample in samples)
    if not len(found.values):
        raise ValueError(f"{folder}: no stored rollouts; a run keeps its newest where log.rollouts_kept > 0")
    return EngineMismatch(
        steps=list(batches),
        differences=torch.from_numpy(found.values),
        lengths=found.lengths,
        log_w=torch.from_numpy(found.log_w),
    )


def phi_of(name: str, params: Mapping[str, Any]) -> PhiOf:
    """Raises ValueError for an objective that has no phi(W)."""

    def phi(length: float, positive: bool) -> Phi:
        return objective_phi(name, length, positive=positive, **params)

    phi(1.0, True)
    return phi


def budget_rows(mismatch: EngineMismatch, phi: PhiOf | None, lengths: Sequence[int] = ()) -> list[BudgetRow]:
    """Three rows for each range of the run's lengths, two for each of ``lengths``."""
    rows: list[BudgetRow] = []
    for members in length_bins(mismatch.lengths, BINS):
        tokens, log_w = mismatch.lengths[members], mismatch.log_w[members]
        span = (int(tokens.min()), int(tokens.max()), float(tokens.mean()), len(members))
        rows += _predictions(mismatch, phi, *span)
        both = _both(phi, span[2])
        rows.append(
            BudgetRow(
                *(*span, "measured", float(log_w.mean()), float(log_w.std(correction=0))),
                signs=both and (measure(both[0], log_w), measure(both[1], log_w)),
                sign_ends=both and (interval(both[0], log_w, level=LEVEL), interval(both[1], log_w, level=LEVEL)),
                deviation_ends=_deviation_ends(log_w),
            )
        )
    for length in lengths:
        rows += _predictions(mismatch, phi, length, length, length, 0)
    return rows


def _predictions(
    mismatch: EngineMismatch, phi: PhiOf | None, shortest: int, longest: int, length: float, responses: int
) -> Iterator[BudgetRow]:
    both, expected = _both(phi, length), mismatch.k3 * length
    span = (shortest, longest, length, responses)
    normal = both and (predict(both[0], mismatch.k3, length), predict(both[1], mismatch.k3, length))
    yield BudgetRow(*span, "normal", -expected, math.sqrt(2 * expected), normal)
    log_w = resample_log_w(mismatch.differences, max(1, round(length)))
    resampled = both and (measure(both[0], log_w), measure(both[1], log_w))
    yield BudgetRow(*span, "resampled", float(log_w.mean()), float(log_w.std(correction=0)), resampled)


def _both(phi: PhiOf | None, length: float) -> tuple[Phi, Phi] | None:
    return phi and (phi(length, True), phi(length, False))


def _deviation_ends(log_w: torch.Tensor, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    generator, n = torch.Generator().manual_seed(seed), len(log_w)
    found = [log_w[torch.randint(n, (n,), generator=generator)].std(correction=0) for _ in range(resamples)]
    lower, upper = torch.stack(found).quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()
    return lower, upper


def run_budget_table(run_dir: Path, name: str, params: Mapping[str, Any], lengths: Sequence[int] = ()) -> str:
    """What ``megatron-vespo budget --run`` prints."""
    mismatch = measure_mismatch(run_dir)
    first, second = table_head("", 33)
    lines = [
        f"{name} under the engine's mismatch in {run_dir}: {describe(mismatch)}",
        f"{'tokens':>11}{'responses':>10}" + first[21:],
        second,
    ]
    for row in budget_rows(mismatch, phi_of(name, params), lengths):
        assert row.signs is not None
        count = f"{row.responses or 'none':>10}"
        label = f"{span_text(row):>11}{count}" if row.source == "normal" else " " * 21
        log_w = f"{row.mean:.2g} ± {row.deviation:.2g}"
        lines.append(f"{label}{row.source:>10}{log_w:>20}{table_cells(*row.signs)}")
        if row.sign_ends and row.deviation_ends:
            ends = zip(("from", "to"), row.deviation_ends, *row.sign_ends, strict=True)
            lines += [f"{word:>31}{f'± {s:.2g}':>20}{table_cells(*signs)}" for word, s, *signs in ends]
    return "\n".join(lines)


def span_text(row: BudgetRow) -> str:
    return f"{row.shortest}" if row.shortest == row.longest else f"{row.shortest}-{row.longest}"


def describe(mismatch: EngineMismatch) -> str:
    """Where the numbers come from, and the mismatch in one."""
    first, last = mismatch.steps[0], mismatch.steps[-1]
    steps = f"step {last}" if first == last else f"steps {first}-{last}"
    return (
        f"k3 = {mismatch.k3:.3g} nats a token, over {len(mismatch.differences):,} tokens of "
        f"{len(mismatch.lengths):,} responses, {steps}"
    )
