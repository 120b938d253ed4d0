"""Advantages inside a prompt group: rewards beside those of the other responses to the same prompt."""

from __future__ import annotations

from typing import Literal, get_args

import torch

STD_EPSILON = 1e-6
"""Added to the standard deviation, as verl's GRPO and with it the authors' code do."""


AdvantageMode = Literal["group-mean", "group-mean-std", "group-soft-value"]


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    mode: AdvantageMode = "group-mean-std",
    temperature: float = 1.0,
) -> torch.Tensor:
    """A_i = r_i - baseline of its group, over the responses i to one prompt.

        group-mean        r_i - mean                                    (VESPO, arXiv 2602.10693v3, eq. 20; Dr.GRPO)
        group-mean-std    (r_i - mean) / (std + 1e-6)                   (GRPO, arXiv 2402.03300)
        group-soft-value  r_i - temperature log mean exp(r / temperature)   (OAPL, arXiv 2602.19362: beta_1)

    The standard deviation is the unbiased one (n - 1). A group of one, or in which all rewards are equal, says nothing
    about its responses: exactly 0.

    Args:
        rewards: [n] float, finite.
        group_ids: [n] int, any numbers; equal ones make a group, wherever they stand.
        mode: see above.
        temperature: in units of the reward, for group-soft-value alone.

    Returns:
        [n], dtype and device of ``rewards`` (computed in float64).

    Raises:
        ValueError: shapes differ, a reward is not finite (its index is named), the temperature is not positive, or the
            mode is unknown.
    """
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must both be [n], got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    if not rewards.is_floating_point() or group_ids.is_floating_point():
        raise ValueError(f"rewards must be float and group_ids int, got {rewards.dtype} and {group_ids.dtype}")
    if mode not in get_args(AdvantageMode):
        raise ValueError(f"unknown advantage mode {mode!r} (available: {', '.join(get_args(AdvantageMode))})")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    broken = (~rewards.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"rewards must be finite, rewards[{broken[0]}] is {rewards[broken[0]].item()}")

    values = rewards.to(torch.float64)
    _, group = group_ids.unique(return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    zeros = values.new_zeros(groups)
    size = zeros.index_add(0, group, torch.ones_like(values))
    highest, lowest = (zeros.scatter_reduce(0, group, values, of, include_self=False) for of in ("amax", "amin"))
    if mode == "group-soft-value":
        mean_exp = zeros.index_add(0, group, ((values - highest[group]) / temperature).exp()) / size
        baseline = highest + temperature * mean_exp.log()
    else:
        baseline = zeros.index_add(0, group, values) / size
    deviation = values - baseline[group]
    # Of equal rewards the mean may be off by a rounding error, which the division would blow up: ask for the spread.
    spread = highest - lowest
    deviation = torch.where(spread[group] > 0, deviation, 0.0)
    if mode == "group-mean-std":
        variance = zeros.index_add(0, group, deviation**2) / (size - 1).clamp(min=1)
        deviation = deviation / (variance.sqrt() + STD_EPSILON)[group]
    return deviation.to(rewards.dtype)
