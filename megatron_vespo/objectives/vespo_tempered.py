"""VESPO whose sequence weight lets in no more of the engine's noise than a given spread, whatever the length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import coefficient_metrics, per_sequence
from megatron_vespo.objectives.ratios import Ratios
from megatron_vespo.objectives.vespo import Vespo


@dataclass(frozen=True, slots=True)
class VespoTempered:
    """l_t = -sg[phi(W_stale W_engine^k)] A log pi_t,    k = min(1, ``noise`` / (sigma sqrt(T))).

    Ours; phi is VESPO's (vespo.py, with its ``c_pos`` and ``c_neg``). The engine's mismatch adds noise to log W whose
    variance grows with the length T, so that VESPO shrinks long responses for it (E[phi] is 0.7 and 0.5 at a standard
    deviation of 1). Here sigma is measured: sigma^2 = sum of (log W_engine)^2 over sum of T, over the mini-batch. A
    response whose expected deviation sigma sqrt(T) is above ``noise`` has its engine part scaled down to it; staleness
    enters whole. noise -> infinity is VESPO, 0 is VESPO with correction ``trainer``. With a correction that keeps the
    engine out of W there is nothing to scale, and this is VESPO.

    Exact under any split; costs one more forward pass a mini-batch. Metrics: VESPO's; ``tempering``, the mean of k.

    Raises ValueError as vespo does, and where ``noise`` is negative.
    """

    c_pos: Sequence[float] = (2.0, 3.0)
    c_neg: Sequence[float] = (3.0, 2.0)
    noise: float = 0.25

    def __post_init__(self) -> None:
        Vespo(self.c_pos, self.c_neg)  # refuses what it cannot use
        if not self.noise >= 0:
            raise ValueError(f"vespo_tempered: noise must be at least 0, got {self.noise}")

    def measure(self, ratios: Ratios) -> torch.Tensor:
        """Sum of (log W_engine)^2, sum of T."""
        return torch.stack([per_sequence(ratios, ratios.log_w_engine**2)[0], per_sequence(ratios, ratios.lengths)[0]])

    def prepare(self, sums: torch.Tensor) -> Tempered:
        squares, tokens = sums.tolist()
        return Tempered(Vespo(self.c_pos, self.c_neg), self.noise, math.sqrt(squares / tokens) if tokens else 0.0)


@dataclass(frozen=True, slots=True)
class Tempered:
    """The kernel with the noise of one mini-batch."""

    vespo: Vespo
    noise: float
    sigma: float
    """Nats per square root of a token."""

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        deviation = self.sigma * ratios.lengths.sqrt()
        scale = torch.where(deviation > self.noise, self.noise / deviation, 1.0)
        # log W holds the engine's part, or does not, as the correction has it.
        log_w = ratios.log_w_stale + scale * (ratios.log_w - ratios.log_w_stale)
        phi = self.vespo.phi(ratios.advantages, log_w)
        token_loss = -ratios.to_tokens(phi * ratios.advantages) * ratios.logprobs
        return token_loss, coefficient_metrics(ratios, phi) | {"tempering": per_sequence(ratios, scale)}
