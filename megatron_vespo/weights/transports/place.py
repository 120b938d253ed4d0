"""A bucket in memory of this machine, told to another process as a line of text: nothing travels but that."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vespo import platform
from megatron_vespo.platform.ipc import IpcHandle
from megatron_vespo.weights.transports.shared_memory import FILE, map_file

DEVICE = "device:"
"""Before a handle, in the name of a place."""


def device_place(handle: IpcHandle) -> str:
    return DEVICE + handle.to_json()


def is_place(text: str) -> bool:
    return text.startswith((FILE, DEVICE))


def open_place(place: str, size: int) -> torch.Tensor:
    """uint8 [size]: what lies there. Raises ValueError for what is no place, or holds less; OSError, PlatformError."""
    if place.startswith(FILE):
        return map_file(Path(place.removeprefix(FILE)), size)
    if not place.startswith(DEVICE):
        raise ValueError(f"{place!r} names no memory of this machine")
    memory = platform.current().open_memory(IpcHandle.from_json(place.removeprefix(DEVICE)))
    if len(memory) < size:
        raise ValueError(f"a bucket of {size} bytes was told to lie in {len(memory)} bytes of device memory")
    return memory[:size]
