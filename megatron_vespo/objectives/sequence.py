"""Sums over the tokens of each response, when a response may be spread over context-parallel ranks.

What a sequence-level objective needs from other ranks is a few sums per response, not their log-probs: one
all-reduce of a [S, k] tensor a micro-batch (16 responses of three sums are 384 bytes, whatever their length).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


@torch.no_grad()
def segment_sums(
    quantities: Sequence[torch.Tensor],
    segment_ids: torch.Tensor,
    num_segments: int,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Sum k per-token quantities over each response, on all ranks of ``cp_group``, in ONE all-reduce.

    Args:
        quantities: k tensors [T], 0 where a token does not count.
        segment_ids: [T] int64 in [0, S), T >= 0.
        num_segments: S, the same on every rank.
        cp_group: ranks that hold the other tokens; None: they are all here.

    Returns:
        [S, k] float64, detached: what depends on a sum is a coefficient, so the backward pass has no collective.

    float64, because log W adds up to tens of thousands of terms that nearly cancel: in float32 its rounding error
    grows with the length, differs with every split, and enters W through exp. In float64 any order of addition gives
    the same coefficients to ~1e-15, and [S, k] is too small for its width to cost anything.
    """
    columns = torch.stack([quantity.detach().to(torch.float64) for quantity in quantities], dim=-1)
    sums = columns.new_zeros(num_segments, len(quantities)).index_add_(0, segment_ids, columns)
    if cp_group is not None and dist.get_world_size(cp_group) > 1 and num_segments > 0:
        dist.all_reduce(sums, group=cp_group)
    return sums
