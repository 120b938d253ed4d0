"""Advantages inside a prompt group: rewards beside those of the other responses to the same prompt."""

from __future__ import annotations

from typing import Literal

import torch

STD_EPSILON = 1e-6
"""Added to the standard deviation, as verl's GRPO and with it the authors' code do."""


def group_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, mode: Literal["group-mean", "group-mean-std"] = "group-mean-std"
) -> torch.Tensor:
    """A_i = r_i - mean of its group (VESPO, arXiv 2602.10693v3, eq. 20), or that / (std + 1e-6) (GRPO, 2402.03300).

    The standard deviation is the unbiased one (n - 1). A group of one, or in which all rewards are equal, says nothing
    about its responses: exactly 0.

    Args:
        rewards: [n] float, finite.
        group_ids: [n] int, any numbers; equal ones make a group, wherever they stand.
        mode: see above.

    Returns:
        [n], dtype and device of ``rewards`` (computed in float64).

    Raises:
        ValueError: shapes differ, a reward is not finite (its index is named), or the mode is unknown.
    """
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must both be [n], got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    if not rewards.is_floating_point() or group_ids.is_floating_point():
        raise ValueError(f"rewards must be float and group_ids int, got {rewards.dtype} and {group_ids.dtype}")
    if mode not in ("group-mean", "group-mean-std"):
        raise ValueError(f"unknown advantage mode {mode!r} (available: group-mean, group-mean-std)")
    broken = (~rewards.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"rewards must be finite, rewards[{broken[0]}] is {rewards[broken[0]].item()}")

    values = rewards.to(torch.float64)
    _, group = group_ids.unique(return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    zeros = values.new_zeros(groups)
    size = zeros.index_add(0, group, torch.ones_like(values))
    deviation = values - (zeros.index_add(0, group, values) / size)[group]
    # Of equal rewards the mean may be off by a rounding error, which the division would blow up: ask for the spread.
    spread = zeros.scatter_reduce(0, group, values, "amax", include_self=False) - zeros.scatter_reduce(
        0, group, values, "amin", include_self=False
    )
    deviation = torch.where(spread[group] > 0, deviation, 0.0)
    if mode == "group-mean-std":
        variance = zeros.index_add(0, group, deviation**2) / (size - 1).clamp(min=1)
        deviation = deviation / (variance.sqrt() + STD_EPSILON)[group]
    return deviation.to(rewards.dtype)
