"""OAPL: off-policy regression to the optimal advantage (arXiv 2602.19362)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import moments
from megatron_vespo.objectives.ratios import Ratios


@dataclass(frozen=True, slots=True)
class Oapl:
    """L_i = (beta log W_i - A_i)^2.

    Source: the paper's loss with beta_2 = 1e-3, as in NeMo-RL: no ratio, but a regression whose solution is the
    KL-regularised optimum pi* ~ mu exp(A / beta). For that, A = r - V with the soft value V = beta_1 log mean
    exp(r / beta_1) of the group: set advantages ``group-soft-value`` (beta_1 = 1, as published) and aggregation
    ``seq-mean-token-sum``, under which the loss is the mean of L_i; published_settings("oapl") names both.

    Every token gets L_i / T_i, and of the gradient 2 (beta log W_i - A_i) beta grad(log pi_t) what is its own: both add
    up to L_i's, and the backward pass has no collective. On policy this is 2 beta times the policy gradient, so
    learning rate and gradient clipping are not those of the other objectives (the paper clips at 1e-3). Metrics:
    moments of ``residual``, beta log W - A.

    Raises ValueError where beta is not positive.
    """

    beta: float = 1e-3

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"oapl: beta must be positive, got {self.beta}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        residual = self.beta * ratios.log_w - ratios.advantages
        value = ratios.to_tokens(ratios.per_token_mean(residual * residual))
        carries_gradient = ratios.logprobs - ratios.logprobs.detach()  # 0
        token_loss = value + ratios.to_tokens(2 * self.beta * residual) * carries_gradient
        return token_loss, moments(ratios, "residual", residual)
