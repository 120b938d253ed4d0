"""Metrics that survive any split: each is a (sum, denominator) pair, added over the split and divided once.

Convention under context parallelism: every rank returns its SHARE, and the sum over the ranks counts everything once.
A per-token metric is a sum over this rank's own tokens; a per-response metric, which all ranks of a CP group know,
comes from the group's first rank and is (0, 0) on the others. So add over CP and DP ranks and micro-batches alike.
The names do not depend on the data: every rank has the same keys, and one all-reduce of all pairs adds them.

Moments. ``x/mean`` and ``x/mean_square`` are stored with the same denominator n; what is not a mean (``x/std``,
``x/ess``) is formed after the addition, by observe.metrics.MetricSums.
"""

from __future__ import annotations

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.ratios import LOG_RATIO_BOUND, Ratios, bounded_exp


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


def coefficient_metrics(ratios: Ratios, phi: torch.Tensor) -> dict[str, Metric]:
    """Of an objective that weighs whole responses: moments of its coefficient ``phi`` [S], and its mean by sign of A.

    phi_positive counts A >= 0, phi_negative A < 0.
    """
    positive = ratios.advantages >= 0
    return moments(ratios, "phi", phi) | {
        "phi_positive/mean": per_sequence(ratios, phi, among=positive),
        "phi_negative/mean": per_sequence(ratios, phi, among=~positive),
    }


def correction_metrics(ratios: Ratios, factor: torch.Tensor) -> dict[str, Metric]:
    """Moments over tokens of a correction's ``factor`` [T], and the share of tokens that it keeps."""
    return {
        "correction/mean": per_token(ratios, factor),
        "correction/mean_square": per_token(ratios, factor * factor),
        "correction_kept": per_token(ratios, factor != 0),
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
