"""Block fp8: a weight as float8_e4m3fn values and one float32 scale for every 128 x 128 block of them.

The layout of DeepSeek-V3's checkpoints, which SGLang serves: ``weight`` and beside it ``weight_scale_inv``, with
weight = values * scale. A block at the edge of a weight is cut off there and has a scale of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
"""The largest float8_e4m3fn: four exponent bits, three of mantissa, no infinities."""
SMALLEST_AMAX = 1e-10
"""A block of zeros gets the scale of this magnitude, so that nothing is divided by 0."""


def takes_fp8(name: str) -> bool:
    """Whether SGLang's block fp8 quantises the tensor of this HF name: the projections of attention, MLP and experts.

    Embeddings, head, norms, biases and the router keep their precision.
    """
    owner, _, last = name.rpartition(".")
    projection = owner.rpartition(".")[2] if last == "weight" else last
    return ".layers." in name and "_proj" in projection and last != "bias"


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values [..., rows, columns] float8_e4m3fn and scales [..., row blocks, column blocks] float32 of ``weight``.

    ``weight``: [..., rows, columns], any floating dtype; leading dimensions are matrices of their own. A block's
    largest magnitude becomes 448; the rest is rounded to nearest, ties to even.
    """
    rows, columns = weight.shape[-2:]
    blocks = _in_blocks(weight.float())
    scales = blocks.abs().amax((-3, -1)).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    values = to_e4m3(blocks / scales[..., :, None, :, None])
    return values.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous(), scales


def dequantise_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight [..., rows, columns] that :func:`quantise_blocks`' ``values`` and ``scales`` stand for."""
    rows, columns = values.shape[-2:]
    blocks = _in_blocks(values.float()) * scales[..., :, None, :, None]
    return blocks.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous()


def to_e4m3(values: Tensor) -> Tensor:
    """``values`` to the nearest float8_e4m3fn; beyond +-448 to +-448, as SGLang's kernels do."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _in_blocks(matrix: Tensor) -> Tensor:
    """[..., row blocks, BLOCK, column blocks, BLOCK], padded with zeros."""
    rows, columns = matrix.shape[-2:]
    padded = F.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
