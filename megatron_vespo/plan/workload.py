"""How long prompts and responses are: a run's own prompt groups, or a stated distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section
from megatron_vespo.samples.records import Sample

P95 = 1.6448536269514722
"""The standard normal's."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """One prompt group in tokens."""

    prompt: int
    responses: np.ndarray
    """[responses] int64."""

    @property
    def tokens(self) -> int:
        """What the trainer sees: the prompt with each response."""
        return self.prompt * len(self.responses) + int(self.responses.sum())


class Workload(Protocol):
    def draw(self, rng: np.random.Generator, size: int, longest: int) -> GroupShape:
        """A group of ``size`` responses, cut at ``longest`` tokens."""


class StatedLengths(Section):
    """Log-normal responses, independent of each other, before they are cut."""

    mean: PositiveFloat = 4000
    """Tokens of a response, were it not cut."""
    p95: PositiveFloat = 12000
    """95 % of responses are at most so long; at most 3.8 times the mean."""
    prompt: PositiveInt = 150
    """Tokens of every prompt."""

    def draw(self, rng: np.random.Generator, size: int, longest: int) -> GroupShape:
        spread = log_normal_sigma(self.mean, self.p95)
        drawn = rng.lognormal(math.log(self.mean) - spread**2 / 2, spread, size)
        return GroupShape(self.prompt, np.clip(np.rint(drawn), 1, longest).astype(np.int64))


def log_normal_sigma(mean: float, p95: float) -> float:
    """The standard deviation of log length, from ln(p95 / mean) = P95 sigma - sigma^2 / 2 (the smaller root). Raises
    ValueError where no log-normal has such a pair."""
    inside = P95**2 - 2 * math.log(p95 / mean)
    if p95 < mean or inside < 0:
        raise ValueError(
            f"lengths.mean = {mean:g} and lengths.p95 = {p95:g}: a log-normal's 95th percentile is between 1 and "
            f"{math.exp(P95**2 / 2):.1f} times its mean; state another pair"
        )
    return P95 - math.sqrt(inside)


@dataclass(frozen=True)
class MeasuredLengths:
    """Draws whole prompt groups, so that the responses to a hard problem stay long together."""

    groups: Sequence[GroupShape]

    def draw(self, rng: np.random.Generator, size: int, longest: int) -> GroupShape:
        """Of another size than the group that was measured: responses drawn from it with replacement."""
        group = self.groups[int(rng.integers(len(self.groups)))]
        responses = group.responses
        if len(responses) != size:
            responses = rng.choice(responses, size)
        return GroupShape(group.prompt, np.clip(responses, 1, longest))


def groups_of(samples: Iterable[Sample]) -> list[GroupShape]:
    """The prompt groups of stored samples, in order. A sample's id is ``<batch>/<prompt id>/<index>``."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.id.rpartition("/")[0], []).append(sample)
    return [
        GroupShape(len(group[0].prompt.tokens), np.array([len(s.response_tokens) for s in group], np.int64))
        for group in found.values()
    ]
