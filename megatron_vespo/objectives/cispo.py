"""CISPO: clipped importance-sampling policy optimization (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import per_token
from megatron_vespo.objectives.ratios import Ratios


@dataclass(frozen=True, slots=True)
class Cispo:
    """l_t = -sg[clip(r_t, low, high)] A log pi_t.

    Source: eq. 4 and 5. The clip bounds a token's weight and, unlike PPO's, never takes its gradient away. ``low`` and
    ``high`` bound the ratio itself. The paper sets no lower bound and does not name its upper one; 5 is ScaleRL's
    (arXiv 2510.13786; TRL reads its epsilon_high so, verl as 1 + epsilon). ``clip_fraction``: tokens outside.

    Raises ValueError unless 0 <= low <= 1 <= high.
    """

    low: float = 0.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                f"cispo: the ratio itself is clipped to [low, high] (not to 1 -+ epsilon), so 0 <= low <= 1 <= high; "
                f"got {self.low} and {self.high}"
            )

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        ratio = ratios.token_ratio().detach()
        weight = ratio.clamp(self.low, self.high)
        token_loss = -weight * ratios.token_advantages() * ratios.logprobs
        return token_loss, {"clip_fraction": per_token(ratios, ratio != weight)}
