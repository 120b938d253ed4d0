"""GSPO: group sequence policy optimization (arXiv 2507.18071)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.grpo import check_clip, clipped_surrogate
from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import per_sequence
from megatron_vespo.objectives.ratios import Ratios, bounded_exp


@dataclass(frozen=True, slots=True)
class Gspo:
    """L_i = -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i),    s_i = W_i^(1/T_i).

    Source: eq. 5 with the ratio of eq. 7, defaults of section 5.1. Every token of a response has the loss L_i, so that
    ``seq-mean-token-mean`` is the published objective and the other aggregations weigh responses by length.

    The gradient of s_i = exp(mean_t log r_t) crosses tokens, hence context-parallel ranks. It is written in the form of
    eq. 14 instead, s_it = sg[s_i] pi_t / sg[pi_t], in which a token's gradient stays with the token: the backward pass
    has no collective. As A is one number a response, T_i equal losses of gradient s_i A_i grad(log pi_t) add up to
    the gradient of T_i L_i (section 4.3 of the paper), exactly. That makes GSPO-token (eq. 13), which exists for
    advantages that differ inside a response, the same objective here; the name ``gspo_token`` is this class, too.

    Raises ValueError unless 0 <= clip_low <= 1 and clip_high >= 0.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        check_clip("gspo", self.clip_low, self.clip_high)

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        sequence_ratio = bounded_exp(ratios.per_token_mean(ratios.log_w))
        low, high = 1 - self.clip_low, 1 + self.clip_high
        carries_gradient = torch.exp(ratios.logprobs - ratios.logprobs.detach())  # 1
        token_loss, _ = clipped_surrogate(
            ratios.to_tokens(sequence_ratio) * carries_gradient,
            ratios.token_advantages(),
            low,
            high,
        )
        _, clipped = clipped_surrogate(sequence_ratio, ratios.advantages, low, high)
        return token_loss, {"clip_fraction": per_sequence(ratios, clipped)}
