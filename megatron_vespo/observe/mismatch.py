"""Train-inference mismatch: the engine's log-probs against the trainer's under the same weights.

Of every counted token let d = log pi_old - log mu. Of a step, over all its tokens and all its responses at once:

    rollout_logprob_diff  mean |d| a token              } objectives/metrics.py
    k3_engine             mean exp(d) - 1 - d a token   }
    mismatch/kl           mean of -d a token: KL(mu || pi_old) in nats, unbiased, of either sign (k1)
    mismatch/max          largest |d| of a token
    mismatch/ppl_ratio    mean over responses of exp(mean of d): the engine's perplexity over the trainer's;
                          and with /p05 /p50 /p95 its quantiles, interpolated linearly
    sync_probe_max, sync_probe_diff, sync_probe_k3
                          largest |d|, mean |d| and k3 of fixed sequences, scored by both right after a weight sync

log W_engine of a response, the sum of its d, has its quantiles and effective sample size under ``health/``
(weight_health.py). By position in the response and by its length: :func:`by_position`, :func:`by_length`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.objectives.ratios import LOG_RATIO_BOUND
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.observe.weight_health import effective_share
from megatron_vespo.samples.records import Sample

SMALLEST_BUCKET = 16
"""Buckets are 0-15, 16-63, 64-255, ...: each ends at four times as many tokens as the one before."""
QUANTILES = (5, 50, 95)
"""Per cent."""


@dataclass(frozen=True, slots=True)
class Differences:
    """The counted tokens of some responses end to end. Responses without a counted token are left out."""

    values: np.ndarray
    """[tokens] float64: log pi_old - log mu."""
    positions: np.ndarray
    """[tokens]: index in the response, from 0."""
    lengths: np.ndarray
    """[responses]: counted tokens of each."""

    @property
    def responses(self) -> np.ndarray:
        """[tokens]: which response."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def log_w(self) -> np.ndarray:
        """[responses]: log W_engine."""
        return np.bincount(self.responses, self.values, len(self.lengths))


@dataclass(frozen=True, slots=True)
class Bucket:
    """What the tokens of one range of positions, or the responses of one range of lengths, have."""

    first: int
    last: int
    tokens: int
    responses: int
    """That have a token in it."""
    diff: float
    """Mean |d|."""
    k3: float
    kl: float
    largest: float
    """Of |d|."""
    ppl_ratio: float
    """Mean over the responses of exp(mean of their d in this bucket)."""
    log_w_deviation: float
    """Of the sums over the responses' d in this bucket: of log W_engine where the buckets are of length."""
    ess: float
    """Effective share of W from those sums, in (0, 1]."""


def differences(samples: Iterable[Sample]) -> Differences:
    """Of the samples that have log pi_old."""
    known = [sample for sample in samples if sample.old_logprobs is not None]
    if not known:
        return Differences(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
    # All at once: a call of numpy's a sample is what a driver of 10,000 samples a second has no time for.
    counted = np.concatenate([sample.loss_mask for sample in known])
    old = np.concatenate([sample.old_logprobs for sample in known if sample.old_logprobs is not None])
    rollout = np.concatenate([sample.rollout_logprobs for sample in known])
    sizes = np.array([len(sample.loss_mask) for sample in known], np.int64)
    positions = np.arange(len(counted)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    lengths = np.bincount(np.repeat(np.arange(len(known)), sizes)[counted], minlength=len(known))
    return Differences((old.astype(np.float64) - rollout)[counted], positions[counted], lengths[lengths > 0])


def mismatch_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Those under ``mismatch/``; {} where no sample has a counted token and log pi_old."""
    found = differences(samples)
    if not len(found.values):
        return {}
    ratios = np.exp(np.minimum(found.log_w / found.lengths, LOG_RATIO_BOUND))
    quantiles = np.quantile(ratios, [q / 100 for q in QUANTILES]).tolist()
    return {
        "mismatch/kl": float(-found.values.mean()),
        "mismatch/max": float(np.abs(found.values).max()),
        "mismatch/ppl_ratio": float(ratios.mean()),
        **{f"mismatch/ppl_ratio/p{q:02d}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


def add_probe(metrics: MetricSums, values: np.ndarray) -> float:
    """Adds ``sync_probe_*`` of ``values`` [tokens], trainer minus engine; returns the largest, NaN where one is."""
    magnitudes = np.abs(values)
    metrics.add("sync_probe_diff", float(magnitudes.sum()), float(len(values)))
    metrics.add("sync_probe_k3", float(k3(values).sum()), float(len(values)))
    worst = float(magnitudes.max(initial=0.0))
    metrics.add_maximum("sync_probe_max", worst)
    return worst


def by_position(found: Differences) -> list[Bucket]:
    """Tokens by their index in the response, ascending; buckets without any are left out."""
    return _buckets(found, found.positions)


def by_length(found: Differences) -> list[Bucket]:
    """Whole responses by their counted tokens, likewise."""
    return _buckets(found, np.repeat(found.lengths, found.lengths))


def k3(values: np.ndarray) -> np.ndarray:
    """exp(d) - 1 - d of each of ``values``, d no larger than LOG_RATIO_BOUND: as objectives/metrics.py."""
    return np.expm1(np.minimum(values, LOG_RATIO_BOUND)) - values


def _buckets(found: Differences, place: np.ndarray) -> list[Bucket]:
    edges = _edges(int(place.max(initial=0)))
    which = np.searchsorted(edges, place, side="right") - 1
    responses = found.responses
    return [
        _bucket(int(edges[i]), int(edges[i + 1]) - 1, found.values[which == i], responses[which == i])
        for i in np.unique(which).tolist()
    ]


def _bucket(first: int, last: int, values: np.ndarray, responses: np.ndarray) -> Bucket:
    _, of_response, tokens = np.unique(responses, return_inverse=True, return_counts=True)
    sums = np.bincount(of_response, values)
    return Bucket(
        first,
        last,
        tokens=len(values),
        responses=len(sums),
        diff=float(np.abs(values).mean()),
        k3=float(k3(values).mean()),
        kl=float(-values.mean()),
        largest=float(np.abs(values).max()),
        ppl_ratio=float(np.exp(np.minimum(sums / tokens, LOG_RATIO_BOUND)).mean()),
        log_w_deviation=float(sums.std()),
        # Only ratios of weights count: taken against the largest, none overflows.
        ess=effective_share(np.exp(sums - sums.max())),
    )


def _edges(largest: int) -> np.ndarray:
    """First members of the buckets up to ``largest``, and the first beyond."""
    edges = [0, SMALLEST_BUCKET]
    while edges[-1] <= largest:
        edges.append(4 * edges[-1])
    return np.array(edges)
