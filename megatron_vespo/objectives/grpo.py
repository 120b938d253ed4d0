"""GRPO: the PPO surrogate clipped per token, with group advantages (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import per_token
from megatron_vespo.objectives.ratios import Ratios


@dataclass(frozen=True, slots=True)
class Grpo:
    """l_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),    and for A < 0 at most -dual_clip A.

    Source: DeepSeekMath (arXiv 2402.03300) eq. 3 without its KL term; separate bounds ("clip-higher", 0.2 / 0.28) are
    DAPO's (arXiv 2503.14476, eq. 8) and the VESPO paper's GRPO baseline; dual clip is that of arXiv 1912.09729, c = 3
    as in verl, None leaves it out. dapo.py and dr_grpo.py are this loss with the clips of their papers.

    Beyond |log r| = 20 the ratio is a constant: exp would reach inf and its gradient NaN. That concerns only A < 0,
    r > 4.9e8 without dual clip; elsewhere such a token is clipped anyway.

    Raises ValueError unless 0 <= clip_low <= 1, clip_high >= 0 and dual_clip > 1 + clip_high (or None).
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        check_clip("grpo", self.clip_low, self.clip_high)
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(f"grpo: dual_clip must exceed 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        advantages = ratios.token_advantages()
        ratio = ratios.token_ratio()
        token_loss, clipped = clipped_surrogate(ratio, advantages, 1 - self.clip_low, 1 + self.clip_high)
        metrics = {"clip_fraction": per_token(ratios, clipped)}
        if self.dual_clip is not None:
            token_loss, dual_clipped = dual_clip(token_loss, ratio, advantages, self.dual_clip)
            metrics["dual_clip_fraction"] = per_token(ratios, dual_clipped)
        return token_loss, metrics


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r, low, high) A) elementwise, and where the clip took the gradient away (bool)."""
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages), clipped


def dual_clip(
    token_loss: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``token_loss``, for A < 0 at most -bound A, and where that took the gradient away (bool)."""
    negative = advantages < 0
    return torch.where(negative, token_loss.clamp(max=-bound * advantages), token_loss), negative & (ratio > bound)


def check_clip(objective: str, clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"{objective}: the ratio is clipped to [1 - clip_low, 1 + clip_high], so clip_low must be in [0, 1] and "
            f"clip_high >= 0; got {clip_low} and {clip_high}"
        )
