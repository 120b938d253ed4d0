"""ReSPO: Renyi sequence-level policy optimization (arXiv 2609.35433)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import coefficient_metrics
from megatron_vespo.objectives.ratios import LOG_RATIO_BOUND, Ratios


@dataclass(frozen=True, slots=True)
class Respo:
    """l_t = -sg[phi(W)] A log pi_t,    phi = phi0 exp(l (1 - phi0)),    phi0 = [(1 - b) + b W^(a-1)]^(1/(a-1)).

    Source: the paper's kernel. phi0 is a power mean of 1 (the behaviour policy) and W (the policy) with weights 1 - b
    and b; at a = 1 it is the geometric one, W^b. ``positive`` = (a, b, l) of responses with A >= 0, ``negative`` of
    those with A < 0. The defaults give phi = (1+W)/2 exp(1 - W) and sqrt(W) exp(2 (1 - sqrt(W))). Unlike VESPO's, the
    positive branch does not vanish as W goes to 0: it tends to (1-b)^(1/(a-1)) times a constant.

    log W is held within +-20 as in the authors' code; the sign comes from the response's advantage (theirs reads the
    first token's). Raises ValueError unless a > 0, 0 < b < 1 and l >= 0, all finite.
    """

    positive: Sequence[float] = (2.0, 0.5, 2.0)
    negative: Sequence[float] = (1.0, 0.5, 2.0)

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            triple = getattr(self, name)
            if not isinstance(triple, Sequence) or len(triple) != 3 or not all(map(math.isfinite, triple)):
                raise ValueError(f"respo: {name} must be three finite numbers (a, b, l), got {triple!r}")
            a, b, strength = triple
            if not (a > 0 and 0 < b < 1 and strength >= 0):
                raise ValueError(f"respo: {name} = (a, b, l) needs a > 0, 0 < b < 1 and l >= 0, got {triple!r}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        phi = torch.where(
            ratios.advantages >= 0, kernel(ratios.log_w, *self.positive), kernel(ratios.log_w, *self.negative)
        )
        token_loss = -ratios.to_tokens(phi * ratios.advantages) * ratios.logprobs
        return token_loss, coefficient_metrics(ratios, phi)


def kernel(log_w: torch.Tensor, a: float, b: float, strength: float) -> torch.Tensor:
    """phi(W) elementwise, from log W; ``strength`` is the paper's lambda."""
    log_w = log_w.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if a == 1:
        log_phi0 = b * log_w
    else:
        mixed = torch.logaddexp(torch.full_like(log_w, math.log1p(-b)), math.log(b) + (a - 1) * log_w)
        log_phi0 = mixed / (a - 1)
    return torch.exp(log_phi0 - strength * torch.expm1(log_phi0))
