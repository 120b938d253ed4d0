"""float8_e4m3 weights in blocks of 128 x 128 with float32 scales: what SGLang's fp8 and DeepSeek's files hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SCALE_SUFFIX = "_scale_inv"
"""Of the tensor that holds a weight's scales. In spite of its name it is what the fp8 values are multiplied by."""

_LINEAR = re.compile(r"\.(?:\w+_proj|kv_a_proj_with_mqa|w[123])\.weight$")


def is_block_quantised(name: str) -> bool:
    """Whether an fp8 checkpoint holds this HF tensor in blocks: the weights of attention, MLP and experts.

    Embedding, output layer, router, norms and biases stay as they are, as in the published fp8 checkpoints of
    DeepSeek-V3 and Qwen3 and as SGLang's fp8 expects them.
    """
    return _LINEAR.search(name) is not None


def quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [rows, columns] -> (float8_e4m3fn [rows, columns], float32 scales [rows / 128, columns / 128]), the
    divisions rounded up: blocks at the lower and right edge may be smaller.

    A block's scale maps its largest magnitude to 448. Non-finite values make their whole block NaN.
    """
    rows, columns = weight.shape
    blocks = _blocks(weight).float()
    # The lower bound keeps a block of zeros (or of denormals) from being divided by zero.
    scales = (blocks.abs().amax((1, 3)) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    # A quotient may round to just above the largest; e4m3fn has no infinity to catch it.
    scaled = (blocks / scales[:, None, :, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return scaled.flatten(2).flatten(0, 1)[:rows, :columns], scales


def dequantise_blocks(
    quantised: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight [rows, columns] that fp8 values and their scales (of :func:`quantise_blocks`) stand for."""
    expected = [-(-size // BLOCK) for size in quantised.shape]
    if list(scales.shape) != expected:
        raise ValueError(
            f"scales of shape {list(scales.shape)} for an fp8 weight of shape {list(quantised.shape)}: "
            f"blocks of {BLOCK} x {BLOCK} need {expected}"
        )
    return (quantised.float() * _spread(scales, quantised.shape)).to(dtype)


def quantise_stream(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """HF tensors with each linear weight as two: its fp8 values under its own name, then its scales."""
    for name, tensor in tensors:
        if is_block_quantised(name):
            values, scales = quantise_blocks(tensor)
            yield name, values
            yield name + SCALE_SUFFIX, scales
            del values, scales
        else:
            yield name, tensor
        del tensor  # before the next is made


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """[block rows, 128, block columns, 128]; what the edge lacks of a block is zeros."""
    rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        weight = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return weight.reshape(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)


def _spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each element's scale [rows, columns]."""
    return scales.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
