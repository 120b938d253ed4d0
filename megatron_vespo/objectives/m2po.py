"""M2PO: second-moment trust policy optimization (arXiv 2510.01161)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import per_token
from megatron_vespo.objectives.ratios import Ratios

SMALLEST, LARGEST, BINS = 1e-4, 20.0, 4096
"""Edges of the histogram of |log r|: 4096 from 1e-4 to 20, each 0.3 % above the one before."""


@dataclass(frozen=True, slots=True)
class M2po:
    """l_t = -M_t r_t A,    M_t = 0 for the harmful tokens of largest |log r_t|.

    Harmful are the tokens that PPO might clip: A > 0 and r > 1, or A < 0 and r < 1. Of these, the largest are dropped
    until the mean of (log r)^2 over those that remain is at most ``threshold``: a bound for the mini-batch, not for a
    token. Dropped tokens stay in the denominators (footnote 2 of the paper).

    Source: Algorithm 1 and eq. 5; 0.04 in all its experiments. (The authors' repository also has a version that clips
    at the bound instead of dropping.) To sort all tokens of a mini-batch one would have to gather them. Instead,
    ``measure`` returns a histogram of |log r| of the harmful tokens, counts and sums of squares, and the bound is one
    of its edges. So the search is exact under any split, and drops what Algorithm 1 drops, and in addition tokens that
    are less than 0.3 % below its bound. It costs one more forward pass a mini-batch.

    ``clip_fraction``: share of tokens that M drops. Raises ValueError unless threshold > 0.
    """

    threshold: float = 0.04

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"m2po: threshold must be positive, got {self.threshold}")

    def measure(self, ratios: Ratios) -> torch.Tensor:
        """Counts of harmful tokens by |log r| (below the first edge, ..., from the last on), then sums of squares."""
        sizes = ratios.log_ratio.detach()[harmful(ratios)].abs()
        bins = torch.bucketize(sizes, edges(sizes), right=True)
        columns = torch.stack([torch.ones_like(sizes), sizes * sizes])
        return sizes.new_zeros(2, BINS + 1).index_add_(1, bins, columns).flatten()

    def prepare(self, sums: torch.Tensor) -> DroppedFrom:
        counts, squares = sums.view(2, BINS + 1).cumsum(1)
        kept_bins = int((squares <= self.threshold * counts).sum())
        upper = [0.0, *edges(sums).tolist(), float("inf")]
        return DroppedFrom(bound=upper[kept_bins])


@dataclass(frozen=True, slots=True)
class DroppedFrom:
    """The loss with the bound of one mini-batch: harmful tokens go where |log r| >= bound."""

    bound: float

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        dropped = harmful(ratios) & (ratios.log_ratio.detach().abs() >= self.bound)
        token_loss = torch.where(dropped, 0.0, -ratios.token_ratio() * ratios.token_advantages())
        return token_loss, {"clip_fraction": per_token(ratios, dropped)}


def harmful(ratios: Ratios) -> torch.Tensor:
    """[T] bool; False where masked, as log r is 0 there."""
    return ratios.token_advantages() * ratios.log_ratio.detach() > 0


def edges(like: torch.Tensor) -> torch.Tensor:
    exponents = torch.linspace(0, 1, BINS, dtype=torch.float64, device=like.device)
    return SMALLEST * (LARGEST / SMALLEST) ** exponents
