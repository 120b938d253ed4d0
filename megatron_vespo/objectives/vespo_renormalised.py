"""VESPO whose weights have mean 1 over a mini-batch: what the kernel shrinks on average is given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import coefficient_metrics, per_sequence
from megatron_vespo.objectives.ratios import Ratios
from megatron_vespo.objectives.vespo import Vespo


@dataclass(frozen=True, slots=True)
class VespoRenormalised:
    """l_t = -sg[phi(W) f] A log pi_t,    f = min(1 / mean of phi, ``limit``), of the responses with this sign of A.

    Ours; phi is VESPO's (vespo.py, with its ``c_pos`` and ``c_neg``). Where log W is spread, by staleness or by the
    engine's mismatch, E[phi] falls below 1 (to 0.7 and 0.5 at a standard deviation of 1), and the whole step with it.
    The means of the two signs are taken apart, as the kernels are. ``limit`` keeps a mini-batch in which hardly any
    response has weight from becoming one response's. Within a sign, long ones stay as far below short ones as before.

    The means are over all counted responses of the mini-batch, exact under any split; they cost one more forward pass.
    Metrics: VESPO's, of phi f; ``renormalisation`` is the mean of f over responses.

    Raises ValueError as vespo does, and where ``limit`` is below 1.
    """

    c_pos: Sequence[float] = (2.0, 3.0)
    c_neg: Sequence[float] = (3.0, 2.0)
    limit: float = 10.0

    def __post_init__(self) -> None:
        Vespo(self.c_pos, self.c_neg)  # refuses what it cannot use
        if not self.limit >= 1:
            raise ValueError(f"vespo_renormalised: limit must be at least 1, got {self.limit}")

    def measure(self, ratios: Ratios) -> torch.Tensor:
        """Sum of phi and count of responses, of A >= 0, then of A < 0."""
        phi = Vespo(self.c_pos, self.c_neg).phi(ratios.advantages, ratios.log_w)
        positive = ratios.advantages >= 0
        return torch.stack([x for among in (positive, ~positive) for x in per_sequence(ratios, phi, among)])

    def prepare(self, sums: torch.Tensor) -> Renormalised:
        positive, positives, negative, negatives = sums.tolist()
        return Renormalised(
            Vespo(self.c_pos, self.c_neg), self._factor(positive, positives), self._factor(negative, negatives)
        )

    def _factor(self, total: float, count: float) -> float:
        # Not max(total, tiny): a NaN must reach the loss.
        return self.limit if total * self.limit < count else count / total if count else 1.0


@dataclass(frozen=True, slots=True)
class Renormalised:
    """The kernel with the factors of one mini-batch."""

    vespo: Vespo
    positive: float
    negative: float

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        factor = torch.full_like(ratios.advantages, self.negative).masked_fill(ratios.advantages >= 0, self.positive)
        phi = self.vespo.phi(ratios.advantages, ratios.log_w) * factor
        token_loss = -ratios.to_tokens(phi * ratios.advantages) * ratios.logprobs
        return token_loss, coefficient_metrics(ratios, phi) | {"renormalisation": per_sequence(ratios, factor)}
