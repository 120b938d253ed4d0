"""A checkpoint's files, copied and damaged to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def flip(file: Path, needle: bytes | int) -> None:
    """One bit, in the middle of where ``needle`` is found, or at this byte."""
    data = bytearray(file.read_bytes())
    at = needle if isinstance(needle, int) else data.find(needle) + len(needle) // 2
    assert (at >= 0 and isinstance(needle, int)) or bytes(needle) in data  # type: ignore[arg-type]
    data[at] ^= 1
    file.write_bytes(data)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
