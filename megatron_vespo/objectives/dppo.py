"""DPPO: divergence proximal policy optimization (arXiv 2602.04879)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import per_token
from megatron_vespo.objectives.ratios import Ratios

DELTA = {"tv": 0.15, "kl": 0.05}
"""Thresholds of verl's script; prime-rl and SkyRL take 0.2."""


@dataclass(frozen=True, slots=True)
class Dppo:
    """l_t = -M_t sg[min(r_t, cap)] A log pi_t,    M_t = 0 where the token has moved too far in the direction of A.

    Source: the paper with the code of its authors in verl. p and q are the token's probability under the policy and
    under the behaviour policy. ``divergence`` tv: |p - q| > delta; kl: KL(q || p) of the two Bernoulli distributions
    "this token or another" > delta. Moved in the direction of A: p > q for A > 0, p < q for A < 0. Unlike a bound on
    the ratio, it lets rare tokens multiply their probability and stops likely ones early. ``delta`` None: DELTA.

    ``clip_fraction``: share of tokens that M drops. Raises ValueError for another divergence, or where delta or cap is
    not positive.
    """

    divergence: Literal["tv", "kl"] = "tv"
    delta: float | None = None
    cap: float = 20.0

    def __post_init__(self) -> None:
        if self.divergence not in DELTA:
            raise ValueError(f"dppo: divergence must be tv or kl, got {self.divergence!r}")
        if not (self.cap > 0 and (self.delta is None or self.delta > 0)):
            raise ValueError(f"dppo: delta and cap must be positive, got {self.delta} and {self.cap}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        advantages = ratios.token_advantages()
        log_p = ratios.logprobs.detach()
        log_q = log_p - ratios.log_ratio.detach()
        distance = total_variation(log_p, log_q) if self.divergence == "tv" else binary_kl(log_p, log_q)
        moved_along = advantages * (log_p - log_q) > 0
        dropped = moved_along & (distance > (DELTA[self.divergence] if self.delta is None else self.delta))
        weight = ratios.token_ratio().detach().clamp(max=self.cap)
        token_loss = torch.where(dropped, 0.0, -weight * advantages * ratios.logprobs)
        return token_loss, {"clip_fraction": per_token(ratios, dropped)}


def total_variation(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() - log_q.exp()).abs()


def binary_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(Bernoulli(q) || Bernoulli(p)), in nats; 1 - p and 1 - q are at least 1e-8, as in the authors' code."""
    q = log_q.exp()
    rest_p, rest_q = (-torch.expm1(log_x.clamp(max=0)) for log_x in (log_p, log_q))
    return q * (log_q - log_p) + rest_q * (rest_q.clamp(min=1e-8).log() - rest_p.clamp(min=1e-8).log())
