"""fp8 in the reference engine: what SGLang's kernels round is rounded, and computed with in the model's own dtype.

The rounded values lie in float32 (or bfloat16) tensors, so that any CPU can compute with them. What the kernels do
besides, such as the order in which they add, is not imitated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vespo.weights.fp8 import (
    BLOCK,
    E4M3_MAX,
    SMALLEST_AMAX,
    dequantise_blocks,
    quantise_blocks,
    takes_fp8,
    to_e4m3,
)


@dataclass(frozen=True, slots=True)
class Fp8:
    """What goes through float8_e4m3fn. Embeddings, head, norms and the router never do."""

    weights: bool = False
    """Those of the projections of attention, MLP and experts, in 128 x 128 blocks."""
    activations: bool = False
    """The inputs of the same projections, per token in groups of 128, scaled when they are computed."""
    key_values: bool = False
    """Keys and values as the cache keeps them, scale 1: SGLang's without calibrated scales."""


def round_weights(module: nn.Module) -> None:
    """Round, in place, the weights that :func:`takes_fp8` names. Raises ValueError for experts of another layout."""
    for name, weight in module.named_parameters():
        if not takes_fp8(name):
            continue
        if weight.dim() == 3:
            _check_experts(module.get_submodule(name.rpartition(".")[0]), name)
        # transformers joins an expert's gate and up; a checkpoint has, and the sender quantises, each by itself.
        joined = weight.dim() == 3 and name.endswith("gate_up_proj")
        for part in weight.data.chunk(2, dim=-2) if joined else (weight.data,):
            part.copy_(dequantise_blocks(*quantise_blocks(part)))


def round_inputs(module: nn.Module) -> None:
    """From now on round what enters the projections that :func:`takes_fp8` names. Raises ValueError as above."""
    owners = {name.rpartition(".")[0]: weight.dim() for name, weight in module.named_parameters() if takes_fp8(name)}
    for name, dimensions in owners.items():
        owner: Any = module.get_submodule(name)
        owner.register_forward_pre_hook(_round_first)
        if dimensions == 3:
            _check_experts(owner, name)
            # What lies between the two projections of an expert is the second one's input.
            owner._apply_gate = _rounded(owner._apply_gate)


def round_groups(values: Tensor) -> Tensor:
    """``values`` [..., n] through float8_e4m3fn in groups of 128 along n, each scaled by its own largest magnitude.

    With the kernels' arithmetic: scale = amax / 448 in float32, and the values multiplied by 1 / scale.
    """
    size = values.shape[-1]
    groups = F.pad(values.float(), (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    rounded = to_e4m3(groups * (1 / scales)).float() * scales
    return rounded.flatten(-2)[..., :size].to(values.dtype)


def round_key_values(values: Tensor) -> Tensor:
    """Any shape, through float8_e4m3fn with scale 1."""
    return to_e4m3(values).to(values.dtype)


def _round_first(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return round_groups(inputs[0]), *inputs[1:]


def _rounded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda values: round_groups(function(values))


def _check_experts(experts: nn.Module, name: str) -> None:
    config: Any = getattr(experts, "config", None)
    known = getattr(config, "_experts_implementation", None) in ("grouped_mm", "batched_mm")
    plain = getattr(experts, "has_gate", False) and getattr(experts, "is_concatenated", False)
    if not (known and plain) or getattr(experts, "is_transposed", True):
        raise ValueError(f"the reference engine cannot round {name} to fp8: it knows [experts, gate | up, hidden] only")
