"""What k graded responses to each of a set's problems come to: avg@k, pass@k, maj@k, and how sure that is.

Everything is computed a problem at a time and averaged over the problems, which are the unit of the intervals: k
responses to one problem say little more about the next problem than one does.

**avg@k** is the mean grade. **pass@j** is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1): of n
responses c are right, and pass@j = 1 - C(n - c, j) / C(n, j), the share of all j-subsets with a right one in them.
**maj@k** is the chance that the answer given most often is right; responses without an answer do not vote (a problem
without a vote scores 0), and among answers given equally often one is drawn, so that the score is their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
RIGHT = 1.0
"""The grade from which a response counts as right in pass@k and maj@k."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One graded response."""

    grade: float
    answer: str | None
    """What it answers, normalised: two responses with the same text here vote alike. None: no answer was found."""
    tokens: int
    finish: str
    """Why it ended: ``stop``, or ``length`` where it was cut."""

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    @property
    def right(self) -> bool:
        return self.grade >= RIGHT


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems, and its interval of CONFIDENCE."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one set: every problem with the same number k of responses."""

    problems: int
    k: int
    average: Estimate
    pass_at: dict[int, Estimate]
    """j -> pass@j, for the powers of two below k and k itself."""
    majority: Estimate | None
    """None where no response holds an answer that could vote, as under a reward that asks for none."""
    tokens: float
    """A response, mean."""
    truncated: float
    """Share of the responses."""
    unanswered: float
    """Share of the responses in which no answer was found."""

    @property
    def scores(self) -> dict[str, Estimate]:
        """By the names that metrics have: avg@k, and where k > 1 pass@k and maj@k."""
        found = {f"avg@{self.k}": self.average}
        if self.k > 1:
            found[f"pass@{self.k}"] = self.pass_at[self.k]
            if self.majority is not None:
                found[f"maj@{self.k}"] = self.majority
        return found


def summarise(problems: Sequence[Sequence[Answered]]) -> Summary:
    """``problems``: the responses to each, at least one, as many to each. Raises ValueError otherwise."""
    sizes = {len(responses) for responses in problems}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"every problem needs the same number of responses, at least one; found {sorted(sizes)}")
    (k,) = sizes
    responses = [response for problem in problems for response in problem]
    right = [sum(response.right for response in problem) for problem in problems]
    voted = any(response.answer is not None for response in responses)
    return Summary(
        problems=len(problems),
        k=k,
        average=estimate([fmean(response.grade for response in problem) for problem in problems], draws=k),
        pass_at={j: estimate([pass_at(k, c, j) for c in right], draws=k // j) for j in _sizes(k)},
        majority=estimate([majority(problem) for problem in problems]) if voted else None,
        tokens=fmean(response.tokens for response in responses),
        truncated=fmean(response.truncated for response in responses),
        unanswered=fmean(response.answer is None for response in responses),
    )


def _sizes(k: int) -> list[int]:
    return [*takewhile(lambda j: j < k, (2**i for i in range(k))), k]


def pass_at(n: int, right: int, k: int) -> float:
    """Chance that k of n responses, drawn without replacement, hold one of the ``right`` ones. Needs k <= n."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(responses: Sequence[Answered]) -> float:
    """Chance that the answer given most often is right; ties are drawn, and responses without an answer do not vote.

    The responses of one answer are graded alike; where a grader failed on some, the answer counts as their mean.
    """
    votes: dict[str, list[bool]] = {}
    for response in responses:
        if response.answer is not None:
            votes.setdefault(response.answer, []).append(response.right)
    if not votes:
        return 0.0
    most = max(len(given) for given in votes.values())
    return fmean(fmean(given) for given in votes.values() if len(given) == most)


# ---------------------------------------------------------------------------------------------- how sure


def estimate(values: Sequence[float], *, draws: int = 1, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of one value a problem, and the interval in which that of all such problems lies.

    The problems are taken as drawn from many like them, so that the spread between problems and that of sampling are
    both in it. Within [0, 1] it is Wilson's score interval for as many independent right-or-wrong draws as would give
    the mean its measured variance (their effective number), with Student's quantile for the variance is estimated; it
    neither leaves [0, 1] nor shrinks to nothing where all problems fail. Grades beyond [0, 1] get Student's.

    ``draws``: independent responses behind each value; the effective number is at most all of them.
    """
    x = np.asarray(values, np.float64)
    n, mean = len(x), float(x.mean())
    bounded = bool(((x >= 0) & (x <= 1)).all())
    if n == 1:  # nothing is known of the next problem
        return Estimate(mean, 0.0, 1.0) if bounded else Estimate(mean, -math.inf, math.inf)
    quantile = float(stdtrit(n - 1, 0.5 + confidence / 2))
    variance = float(x.var(ddof=1)) / n
    if not bounded:
        reach = quantile * math.sqrt(variance)
        return Estimate(mean, mean - reach, mean + reach)
    return _wilson(mean, _effective(mean, variance, n, draws), quantile)


def _effective(mean: float, variance: float, n: int, draws: int) -> float:
    if mean in (0.0, 1.0):
        return float(n)  # all alike: no variance to tell how much more a problem's responses say than one
    most = float(n * max(draws, 1))
    return min(mean * (1 - mean) / variance, most) if variance > 0 else most


def _wilson(mean: float, n: float, quantile: float) -> Estimate:
    """Wilson 1927; n may be broken."""
    square = quantile * quantile / n
    middle = (mean + square / 2) / (1 + square)
    reach = quantile / (1 + square) * math.sqrt(mean * (1 - mean) / n + square / (4 * n))
    # Rounding must not put the mean outside of it.
    return Estimate(mean, max(0.0, min(mean, middle - reach)), min(1.0, max(mean, middle + reach)))
