"""BAPO: balanced policy optimization with adaptive clipping (arXiv 2510.18927)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_vespo.objectives.grpo import clipped_surrogate, dual_clip
from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import per_token
from megatron_vespo.objectives.ratios import Ratios


@dataclass(frozen=True, slots=True)
class Bapo:
    """PPO's clipped surrogate, whose bounds are searched in each mini-batch for a share of positive contributions.

    l_t = -min(r_t A, clip(r_t, c_low, c_high) A), at most -dual_clip A for A < 0. With
        P(c_high) = sum over A > 0 of A min(r, c_high),    N(c_low) = sum over A < 0 of |A| max(r, c_low),
    the bounds start at ``low[0]``, ``high[0]``; while P / (P + N) < ``target``, c_high is raised by ``high_step`` up to
    ``high[1]``, and then c_low by ``low_step`` up to ``low[1]``.

    Source: eq. 8 and Algorithm 1, defaults of section 5.1. (``raise_first`` low is the order of the authors' code,
    whose example settings are target 0.5, low (0.6, 0.8), high (1.2, 2.0); its dual clip of 3 is not in the paper. As
    there, contributions are not weighted by pi_old once more, which eq. 8 writes for its expectation.) As published, N
    is a sum of losses, not of gradients: a higher c_low takes gradients away but makes N larger. So only c_high can
    meet the target, and where it does not, c_low goes to its end.

    P and N at every bound of the search are sums over tokens, so ``measure`` returns them all and the search is exact
    under any split. It costs one more forward pass a mini-batch. Metrics: ``clip_low`` and ``clip_high`` found.

    Raises ValueError unless 0 <= low[0] <= low[1] <= 1 <= high[0] <= high[1], steps positive, target in (0, 1), and
    dual_clip > 1 (or None).
    """

    target: float = 0.4
    low: Sequence[float] = (0.6, 0.9)
    high: Sequence[float] = (1.2, 3.0)
    low_step: float = 0.02
    high_step: float = 0.05
    raise_first: Literal["high", "low"] = "high"
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        if not (len(self.low) == len(self.high) == 2 and 0 <= self.low[0] <= self.low[1] <= 1):
            raise ValueError(
                f"bapo: low and high are pairs (start, end), low within [0, 1]; got {self.low}, {self.high}"
            )
        if not 1 <= self.high[0] <= self.high[1]:
            raise ValueError(f"bapo: high = (start, end) needs 1 <= start <= end, got {self.high}")
        if not (self.low_step > 0 and self.high_step > 0 and 0 < self.target < 1):
            raise ValueError(
                f"bapo: steps must be positive and target in (0, 1), got low_step={self.low_step}, "
                f"high_step={self.high_step}, target={self.target}"
            )
        if self.raise_first not in ("high", "low"):
            raise ValueError(f"bapo: raise_first must be high or low, got {self.raise_first!r}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"bapo: dual_clip must exceed 1 (or be None), got {self.dual_clip}")

    def measure(self, ratios: Ratios) -> torch.Tensor:
        """P at every high bound, then N at every low one."""
        ratio = ratios.token_ratio()
        advantages = torch.where(ratios.mask, ratios.token_advantages(), 0.0)
        positive, negative = advantages.clamp(min=0), (-advantages).clamp(min=0)
        gains = [(positive * ratio.clamp(max=bound)).sum() for bound in grid(self.high, self.high_step)]
        losses = [(negative * ratio.clamp(min=bound)).sum() for bound in grid(self.low, self.low_step)]
        return torch.stack(gains + losses)

    def prepare(self, sums: torch.Tensor) -> ClippedAt:
        highs, lows = grid(self.high, self.high_step), grid(self.low, self.low_step)
        values = sums.tolist()
        gains, losses = values[: len(highs)], values[len(highs) :]
        path = [(i, 0) for i in range(len(highs))] + [(len(highs) - 1, j) for j in range(1, len(lows))]
        if self.raise_first == "low":
            path = [(0, j) for j in range(len(lows))] + [(i, len(lows) - 1) for i in range(1, len(highs))]
        met = [at for at in path if not gains[at[0]] < self.target * (gains[at[0]] + losses[at[1]])]
        i, j = met[0] if met else path[-1]
        return ClippedAt(low=lows[j], high=highs[i], dual_clip=self.dual_clip)


@dataclass(frozen=True, slots=True)
class ClippedAt:
    """The surrogate with the bounds of one mini-batch."""

    low: float
    high: float
    dual_clip: float | None

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        advantages, ratio = ratios.token_advantages(), ratios.token_ratio()
        token_loss, clipped = clipped_surrogate(ratio, advantages, self.low, self.high)
        metrics = {
            "clip_fraction": per_token(ratios, clipped),
            "clip_low": per_token(ratios, torch.full_like(ratio, self.low)),
            "clip_high": per_token(ratios, torch.full_like(ratio, self.high)),
        }
        if self.dual_clip is not None:
            token_loss, dual_clipped = dual_clip(token_loss, ratio, advantages, self.dual_clip)
            metrics["dual_clip_fraction"] = per_token(ratios, dual_clipped)
        return token_loss, metrics


def grid(ends: Sequence[float], step: float) -> list[float]:
    """start, start + step, ... up to the end (which it may fall short of, as Algorithm 1 does)."""
    start, end = ends
    steps = int((end - start) / step + 1e-9)  # 0.3 / 0.02 is 15 less a rounding error
    return [start + i * step for i in range(steps + 1)]
