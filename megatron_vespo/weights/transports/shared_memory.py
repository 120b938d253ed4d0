"""Buckets in memory that the sender and the engines of one machine share: nothing travels but their description."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing

from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.sync import EngineWeights, on_each


class SharedMemory:
    """A :class:`~.streamed.Channel`. Host memory on a GPU machine too: the engine copies it to its device."""

    def __init__(self, engines: Sequence[EngineWeights]) -> None:
        self.engines = engines
        self._buffer: torch.Tensor | None = None

    def open(self) -> None:
        pass

    def buffer(self, size: int) -> torch.Tensor:
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = shared_buffer(size)
        return self._buffer

    def send(self, bucket: Bucket) -> None:
        on_each(self.engines, lambda engine: engine.receive_shared(bucket.flat, bucket.specs))

    def close(self) -> None:
        self._buffer = None


def shared_buffer(size: int) -> torch.Tensor:
    """uint8 [size] of a file under /dev/shm, which goes when the last process that maps it ends.

    Raises RuntimeError where /dev/shm is too small.
    """
    # By name: torch's other strategy passes file descriptors through a server thread in this process, and an engine
    # that asks it for one is not of its process family.
    torch.multiprocessing.set_sharing_strategy("file_system")
    return torch.empty(size, dtype=torch.uint8).share_memory_()


def shared_file(flat: torch.Tensor) -> tuple[Path, int]:
    """The file that a shared buffer, or the beginning of one, lies in, and the byte where it starts there."""
    storage = flat.untyped_storage()
    _, name, _ = storage._share_filename_cpu_()
    file = Path("/dev/shm") / name.decode().removeprefix("/")
    # Before the data torch keeps a count of the processes that map it.
    return file, file.stat().st_size - storage.nbytes()
