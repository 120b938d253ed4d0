"""SAPO: soft adaptive policy optimization (arXiv 2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import per_token
from megatron_vespo.objectives.ratios import Ratios


@dataclass(frozen=True, slots=True)
class Sapo:
    """l_t = -f(r_t) A,    f(r) = (4 / tau) sigmoid(tau (r - 1)),    tau = tau_pos where A > 0, tau_neg where A <= 0.

    Source: the paper's soft gate with its defaults; a token's gradient is 4 p (1 - p) r A grad(log pi_t) with
    p = sigmoid(tau (r - 1)), which is r A at r = 1 and fades on both sides. The published aggregation is
    ``seq-mean-token-mean``. Metric ``gate/mean``: 4 p (1 - p), the share of the gradient that the gate lets through.

    Raises ValueError where a tau is not positive.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        if not (self.tau_pos > 0 and self.tau_neg > 0):
            raise ValueError(f"sapo: tau_pos and tau_neg must be positive, got {self.tau_pos} and {self.tau_neg}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        advantages = ratios.token_advantages()
        # Of two Python numbers torch.where would make float32, and 1.05 is not one.
        tau = torch.full_like(advantages, self.tau_neg).masked_fill(advantages > 0, self.tau_pos)
        p = torch.sigmoid(tau * (ratios.token_ratio() - 1))
        return -(4 / tau) * p * advantages, {"gate/mean": per_token(ratios, 4 * p * (1 - p))}
