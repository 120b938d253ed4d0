"""The sequence-weight health of a step: what the table of its responses says, under the record's ``health/``.

All are taken over every response of the step at once: a quantile, a share or a slope of a mini-batch's part would
depend on the cut. Each is given for the whole, and with ``_stale`` and ``_engine`` for the two factors of W (of phi:
had the other factor been 1). With n responses that have a counted token:

    log_w/p05 p25 p50 p75 p95  quantiles of log W, W = pi / mu, interpolated linearly
    ess_w, ess_phi             (sum x)^2 / (n sum x^2): the share of responses that still carry weight, in (0, 1]
    dead_positive              share of the responses with A > 0 whose phi is below DEAD
    dead_negative              of those with A < 0
    phi_slope                  change of phi per 1,000 tokens of length: least squares with one slope, and a constant
                               for each sign of A, so that one sign's longer responses make no slope

phi is that of objectives/coefficients.py, for any objective: 1 on policy. Responses with A = 0, which have none, are
left out of what is said of phi. A number without data is left out: dead_negative of a step without a response of
A < 0, phi_slope where all responses of a sign have one length.
"""

from __future__ import annotations

import numpy as np

from megatron_vespo.objectives.budget import DEAD
from megatron_vespo.samples.weight_table import WeightTable

PARTS = ("", "_stale", "_engine")
QUANTILES = (5, 25, 50, 75, 95)
"""Per cent."""
TOKENS = 1000
"""phi_slope is per so many."""


def health_metrics(table: WeightTable) -> dict[str, float]:
    """Name -> value, as the module says; {} for a table without a counted token."""
    table = table.rows(table.lengths > 0)
    if not len(table):
        return {}
    weighed = table.rows(table.advantages != 0)
    metrics: dict[str, float] = {}
    for part in PARTS:
        log_w, phi = getattr(table, f"log_w{part}"), getattr(weighed, f"phi{part}")
        values = np.quantile(log_w, [q / 100 for q in QUANTILES]).tolist()
        metrics |= {f"log_w{part}/p{q:02d}": value for q, value in zip(QUANTILES, values, strict=True)}
        # Only ratios of weights count: taken against the largest, none overflows.
        metrics[f"ess_w{part}"] = effective_share(np.exp(log_w - log_w.max()))
        if not len(weighed):
            continue
        metrics[f"ess_phi{part}"] = effective_share(phi)
        for sign, among in (("positive", weighed.advantages > 0), ("negative", weighed.advantages < 0)):
            if among.any():
                metrics[f"dead_{sign}{part}"] = dead_share(phi[among])
        slope = length_slope(weighed.lengths, phi, weighed.advantages > 0)
        if slope is not None:
            metrics[f"phi_slope{part}"] = TOKENS * slope
    return {f"health/{name}": value for name, value in metrics.items()}


def effective_share(weights: np.ndarray) -> float:
    """(sum x)^2 / (n sum x^2) of ``weights`` [n]; 0 where all are 0."""
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / (len(weights) * squares) if squares else 0.0


def dead_share(phi: np.ndarray) -> float:
    """Share of ``phi`` [n] below DEAD; NaN where one of them is: it is neither dead nor alive."""
    return float(np.where(np.isnan(phi), phi, phi < DEAD).mean())


def length_slope(lengths: np.ndarray, values: np.ndarray, positive: np.ndarray) -> float | None:
    """Least squares of ``values`` [n] on ``lengths`` with a constant for ``positive`` [n] bool and one for the others.

    Per token. None where the lengths do not differ within either.
    """
    covariance = variance = 0.0
    for among in (positive, ~positive):
        if among.any():
            deviation = lengths[among] - lengths[among].mean()
            covariance += float(deviation @ values[among])
            variance += float(deviation @ deviation)
    return covariance / variance if variance else None


def length_bins(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Indices of about equally many responses by ascending length, [k] each, in at most ``count`` bins.

    Responses of one length stay in one bin.
    """
    if not len(lengths):
        return []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, count + 1)[1:-1], method="higher"))
    place = np.searchsorted(edges, lengths, side="left")
    return [np.flatnonzero(place == i) for i in np.unique(place)]
