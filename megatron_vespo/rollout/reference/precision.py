"""fp8 in the reference engine: what SGLang's kernels round is rounded, and computed with in the model's own dtype.

The rounded values lie in float32 (or bfloat16) tensors, so that any CPU can compute with them. What the kernels do
besides, such as the order in which they add, is not imitated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vespo.rollout.reference.parameters import parameters_by_hf_name
from megatron_vespo.weights.fp8 import BLOCK, LARGEST, dequantise_blocks, is_block_quantised, quantise_blocks

SMALLEST_AMAX = 1e-10
"""A group of zeros gets the scale of this magnitude, as in SGLang's kernel."""


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
    """Round, in place, each weight that an fp8 checkpoint holds in blocks. Raises ValueError for experts that a
    checkpoint holds otherwise than as parts of the model's parameters."""
    for name, weight in parameters_by_hf_name(module).items():
        if is_block_quantised(name):
            weight.copy_(rounded_weight(weight))


def rounded_weight(weight: Tensor) -> Tensor:
    """float32, what the blocks of one HF tensor [rows, columns] stand for."""
    return dequantise_blocks(*quantise_blocks(weight))


def round_inputs(module: nn.Module) -> None:
    """From now on round what enters the projections whose weights are rounded.

    Raises ValueError for experts whose two projections are not one after the other here.
    """
    # transformers joins the experts of a layer in parameters of three dimensions that have no module of their own.
    joined = {f"{name}.weight": name for name, weight in module.named_parameters() if weight.dim() == 3}
    names = [*joined, *(name for name, _ in module.named_parameters())]
    for owner in dict.fromkeys(joined.get(name, name).rpartition(".")[0] for name in names if is_block_quantised(name)):
        projection: Any = module.get_submodule(owner)
        projection.register_forward_pre_hook(_round_first)
        if not isinstance(projection, nn.Linear):
            if getattr(projection.config, "_experts_implementation", None) not in ("grouped_mm", "batched_mm"):
                raise ValueError(f"the reference engine cannot round the inputs of {owner} to fp8")
            # What lies between the two projections of an expert is the second one's input.
            projection._apply_gate = _rounded(projection._apply_gate)


def round_groups(values: Tensor) -> Tensor:
    """``values`` [..., n] through float8_e4m3fn in groups of 128 along n, each scaled by its own largest magnitude.

    With the kernels' arithmetic: scale = amax / 448 in float32, and the values multiplied by 1 / scale.
    """
    size = values.shape[-1]
    groups = F.pad(values.float(), (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) / LARGEST
    rounded = _e4m3(groups * (1 / scales)).float() * scales
    return rounded.flatten(-2)[..., :size].to(values.dtype)


def round_key_values(values: Tensor) -> Tensor:
    """Any shape, through float8_e4m3fn with scale 1: beyond +-448 to +-448."""
    return _e4m3(values).to(values.dtype)


def _e4m3(values: Tensor) -> Tensor:
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _round_first(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return round_groups(inputs[0]), *inputs[1:]


def _rounded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda values: round_groups(function(values))
