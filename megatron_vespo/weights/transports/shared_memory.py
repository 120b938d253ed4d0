"""Buckets in memory that the sender and the engines of one machine share: nothing travels but their description."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_vespo.weights.buckets import Bucket, ByTurns
from megatron_vespo.weights.sync import EngineWeights, on_each

FILE = "file:"
"""Before the path, in the name of a place (place.py)."""


class SharedMemory:
    """A :class:`~.streamed.Channel`. Host memory on a GPU machine too: the engine copies it to its device."""

    needs_plugin = True

    def __init__(self, engines: Sequence[EngineWeights]) -> None:
        self.engines = engines
        self._files = ByTurns(MemoryFile)

    def open(self) -> None:
        pass

    def buffer(self, size: int) -> torch.Tensor:
        return self._files.next(size).flat

    def send(self, bucket: Bucket) -> None:
        where = bucket.flat.data_ptr()
        (path,) = (file.path for _, file in self._files.made if file.flat.data_ptr() == where)
        on_each(self.engines, lambda engine: engine.receive_shared(lambda: f"{FILE}{path}", bucket.specs))

    def rest(self) -> None:
        pass

    def close(self) -> None:
        self._files.made.clear()


class MemoryFile:
    """A file without a name, in memory: it goes with the last process that has it open, however that ends.

    Unlike torch's own shared memory, whose files under /dev/shm stay when Ray kills a process and its children.
    """

    def __init__(self, size: int) -> None:
        self._file = os.fdopen(os.memfd_create("megatron_vespo-weights"), "r+b")
        self._file.truncate(size)
        self.flat = torch.frombuffer(mmap.mmap(self._file.fileno(), size), dtype=torch.uint8)
        """uint8 [size]"""
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        """Under which other processes of this machine and user open it, as long as this object lives."""


def map_file(path: Path, size: int) -> torch.Tensor:
    """uint8 [size]: the beginning of another process's MemoryFile. Writing to it does not change the file."""
    return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=(size,)))
