"""Metrics that survive any split: each is a (sum, denominator) pair, added over the split and divided once.

Convention under context parallelism: every rank returns its SHARE, and the sum over the ranks counts everything once.
A per-token metric is a sum over this rank's own tokens; a per-response metric, which all ranks of a CP group know,
comes from the group's first rank and is (0, 0) on the others. So add over CP and DP ranks and micro-batches alike.
The names do not depend on the data: every rank has the same keys, and one all-reduce of all pairs adds them.

Moments. ``x/mean`` and ``x/mean_square`` are stored with the same denominator n; what is not a mean is formed
after the addition, by summarize_metrics:

    x/std  = sqrt(mean_square - mean^2)                                             (of the population)
    x/ess  = (sum x)^2 / (n sum x^2) = mean^2 / mean_square, in (0, 1], of weights:  effective sample size over n
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.ratios import LOG_RATIO_BOUND, Ratios, bounded_exp

WEIGHTS = frozenset({"w", "phi"})
"""Quantities that weigh samples, so that an effective sample size means something."""


def per_token(ratios: Ratios, values: torch.Tensor) -> Metric:
    """Mean of ``values`` [T] over the counted tokens."""
    kept = torch.where(ratios.mask, values.detach().to(torch.float64), 0.0)
    return kept.sum(), ratios.mask.sum(dtype=torch.float64)


def per_sequence(ratios: Ratios, values: torch.Tensor, among: torch.Tensor | None = None) -> Metric:
    """Mean of ``values`` [S] over the responses that have a counted token and, if given, are ``among`` [S] bool."""
    chosen = ratios.lengths > 0
    if among is not None:
        chosen = chosen & among
    if not ratios.owns_sequences:
        chosen = torch.zeros_like(chosen)
    return torch.where(chosen, values.to(torch.float64), 0.0).sum(), chosen.sum(dtype=torch.float64)


def moments(ratios: Ratios, name: str, values: torch.Tensor) -> dict[str, Metric]:
    """``name/mean`` and ``name/mean_square`` of ``values`` [S] over responses."""
    return {
        f"{name}/mean": per_sequence(ratios, values),
        f"{name}/mean_square": per_sequence(ratios, values * values),
    }


def ratio_metrics(ratios: Ratios) -> dict[str, Metric]:
    """What every objective reports: the sequence weight with its two factors, and the per-token differences.

    w, log_w                   of the ratio that the objective sees; w is exp of log W within +-LOG_RATIO_BOUND
    log_w_stale, log_w_engine  the two factors of pi / mu, whatever the correction
    rollout_logprob_diff       |log pi_old - log mu| per token
    k3_engine, k3_stale        exp(r) - 1 - r with the token's log W_engine or log W_stale as r: nats per token of
                               KL(mu || pi_old) and KL(pi_old || pi), estimated by terms that cannot be negative
                               (Schulman, http://joschu.net/blog/kl-approx.html)
    """
    return {
        **moments(ratios, "w", bounded_exp(ratios.log_w)),
        **moments(ratios, "log_w", ratios.log_w),
        **moments(ratios, "log_w_stale", ratios.log_w_stale),
        **moments(ratios, "log_w_engine", ratios.log_w_engine),
        "rollout_logprob_diff": per_token(ratios, ratios.log_engine.abs()),
        "k3_engine": per_token(ratios, k3(ratios.log_engine)),
        "k3_stale": per_token(ratios, k3(ratios.log_stale)),
    }


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    # expm1: exp(r) - 1 loses all digits at the differences of 1e-6 that a good engine has.
    return log_ratio.clamp(max=LOG_RATIO_BOUND).expm1() - log_ratio


def add_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Add the pairs of several micro-batches or ranks, name by name."""
    total: dict[str, Metric] = {}
    for part in parts:
        for name, (value, denominator) in part.items():
            if name in total:
                value, denominator = total[name][0] + value, total[name][1] + denominator
            total[name] = (value, denominator)
    return total


def summarize_metrics(total: Mapping[str, Metric]) -> dict[str, float]:
    """Divide, once, after everything was added; then form ``x/std``, and ``x/ess`` of WEIGHTS.

    A metric whose denominator is 0 (no negative response in the mini-batch) is left out: it has no value, nor is it 0.
    """
    pairs = {name: (float(value), float(denominator)) for name, (value, denominator) in total.items()}
    means = {name: value / denominator for name, (value, denominator) in pairs.items() if denominator != 0}
    derived: dict[str, float] = {}
    for name, mean_square in means.items():
        quantity, _, kind = name.rpartition("/")
        mean = means.get(f"{quantity}/mean")
        if kind != "mean_square" or mean is None:
            continue
        derived[f"{quantity}/std"] = math.sqrt(max(mean_square - mean * mean, 0.0))
        if quantity in WEIGHTS and mean_square > 0:
            derived[f"{quantity}/ess"] = mean * mean / mean_square
    return means | derived
