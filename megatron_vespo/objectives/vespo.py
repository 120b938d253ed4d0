"""VESPO: variational sequence-level soft policy optimization (arXiv 2602.10693v3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import coefficient_metrics
from megatron_vespo.objectives.ratios import LOG_RATIO_BOUND, Ratios


@dataclass(frozen=True, slots=True)
class Vespo:
    """l_t = -sg[phi(W)] A log pi_t,    phi(W) = W^c1 exp(c2 (1 - W)),    log W = sum over the response's tokens / T^p.

    Source: eq. 17, shifted so that phi(1) = 1, and the pseudo-code of Appendix I. ``c_pos`` = (c1, c2) of responses
    with A >= 0, ``c_neg`` of those with A < 0; the defaults are the paper's in every experiment (a docstring in the
    authors' code names others, its signature and scripts these). The score is summed over tokens. ``length_power`` p is
    0: W is not normalised by length; 1 and 0.5 are the paper's ablations with 1/T and 1/sqrt(T), which were unstable.
    No KL term, no entropy bonus.

    Numerics. The authors' code clamps each token's log-ratio and the sum to +-20, then floors W at 1e-8. Here only the
    sum is clamped, to +-20: it keeps c2 W finite and moves phi by less than 1e-15 at the default c. A clamp per token
    would change W where a large token is made up for by others; the floor is not needed, since in log space exp
    underflows to 0 by itself; and a NaN is not turned into phi = 0, it reaches the loss. The sign is read from the
    response's advantage, not from its first token's, which may be masked.

    Raises ValueError where c1 or c2 is negative or not finite, or length_power outside [0, 1].
    """

    c_pos: Sequence[float] = (2.0, 3.0)
    c_neg: Sequence[float] = (3.0, 2.0)
    length_power: float = 0.0

    def __post_init__(self) -> None:
        for name in ("c_pos", "c_neg"):
            pair = getattr(self, name)
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(0 <= c < math.inf for c in pair):
                raise ValueError(f"vespo: {name} must be a pair (c1, c2) of finite numbers >= 0, got {pair!r}")

        if not 0 <= self.length_power <= 1:
            raise ValueError(f"vespo: length_power must be in [0, 1] (the paper's: 0), got {self.length_power}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        phi = self.phi(ratios.advantages, ratios.log_w / ratios.lengths.clamp(min=1) ** self.length_power)
        token_loss = -ratios.to_tokens(phi * ratios.advantages) * ratios.logprobs
        return token_loss, coefficient_metrics(ratios, phi)

    def phi(self, advantages: torch.Tensor, log_w: torch.Tensor) -> torch.Tensor:
        """[S]: the kernel of each response's sign of A."""
        return torch.where(advantages >= 0, kernel(log_w, *self.c_pos), kernel(log_w, *self.c_neg))


def kernel(log_w: torch.Tensor, c1: float, c2: float) -> torch.Tensor:
    """phi(W) = W^c1 exp(c2 (1 - W)) elementwise, from log W; its peak is (c1/c2)^c1 exp(c2 - c1), at W = c1/c2."""
    log_w = log_w.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.exp(c1 * log_w - c2 * torch.expm1(log_w))
