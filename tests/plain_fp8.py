"""float8_e4m3fn from its definition, and blocks and groups of it by loops: what the fast code is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rollout_checkpoints import load_plain
from safetensors.torch import load_file, save_file


def _codes() -> np.ndarray:
    """The 127 finite non-negative values in order: 4 bits of exponent, bias 7, and 3 of mantissa, subnormal at 0."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


CODES = _codes()


def e4m3(values: np.ndarray) -> np.ndarray:
    """float64 of any shape to the nearest code, ties to the even one, beyond the largest to the largest."""
    magnitude = np.minimum(np.abs(values), CODES[-1])
    above = np.searchsorted(CODES, magnitude).clip(1, len(CODES) - 1)
    low, high = magnitude - CODES[above - 1], CODES[above] - magnitude
    code = np.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)
    return np.copysign(CODES[code], values)


def rounded_blocks(weight: np.ndarray) -> np.ndarray:
    """[rows, columns] float32, each block of 128 x 128 through e4m3 under its own float32 scale."""
    out = np.empty_like(weight)
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            block = weight[i : i + 128, j : j + 128]
            scale = np.float32(np.abs(block).max()) / np.float32(448)
            out[i : i + 128, j : j + 128] = e4m3(block / scale).astype(np.float32) * scale
    return out


def rounded_groups(values: torch.Tensor) -> torch.Tensor:
    """[..., n], 128 neighbours of a row at a time, with float32 arithmetic."""
    rows = values.float().numpy().reshape(-1, values.shape[-1])
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        for j in range(0, len(row), 128):
            group = row[j : j + 128]
            scale = np.float32(max(np.abs(group).max(), 1e-10)) / np.float32(448)
            out[i, j : j + 128] = e4m3(group * (np.float32(1) / scale)).astype(np.float32) * scale
    return torch.from_numpy(out).view_as(values).to(values.dtype)


def load_rounded(folder: Path, target: Path) -> torch.nn.Module:
    """``folder``'s model in plain transformers, the files' projections rounded before it loads them."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] = torch.from_numpy(rounded_blocks(tensors[name].numpy()))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return load_plain(target)
