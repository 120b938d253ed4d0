"""A platform whose device memory is a table of tensors in this process, opened by handles as CUDA's is."""

from __future__ import annotations

import itertools

import torch

from megatron_vespo.platform import PlatformError
from megatron_vespo.platform.cpu import CpuPlatform
from megatron_vespo.platform.ipc import IpcHandle

UUID = "GPU-6c1d0c80-0000-4000-8000-000000000001"


class DeviceHere(CpuPlatform):
    has_own_memory = True

    def __init__(self, uuid: str = UUID) -> None:
        self.uuid = uuid
        self.shared: dict[bytes, torch.Tensor] = {}
        """Told and not opened yet; as with CUDA, a handle is good once."""
        self.opened = 0
        self._names = itertools.count()

    def share_memory(self, memory: torch.Tensor) -> IpcHandle:
        name = b"\x00\xff allocation %d" % next(self._names)
        self.shared[name] = memory
        return IpcHandle(self.uuid, name, memory.numel(), 0, b"counter", 0, b"\x80event", True, 0, memory.numel())

    def open_memory(self, handle: IpcHandle) -> torch.Tensor:
        if handle.device != UUID:
            raise PlatformError(f"memory of device {handle.device} cannot be opened by this process, which sees {UUID}")
        self.opened += 1
        return self.shared.pop(handle.allocation)
