"""Buckets in the sender's device memory, which the engines of its machine open where it lies (CUDA IPC)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vespo import platform
from megatron_vespo.weights.buckets import Bucket, ByTurns
from megatron_vespo.weights.sync import EngineWeights, on_each
from megatron_vespo.weights.transports.place import device_place


class DeviceMemory:
    """A :class:`~.streamed.Channel`. Nothing is copied to the host, and nothing to the engine but into its weights."""

    needs_plugin = True

    def __init__(self, engines: Sequence[EngineWeights]) -> None:
        self.engines = engines
        self._buffers = ByTurns(
            lambda size: torch.empty(size, dtype=torch.uint8, device=platform.current().device),
        )

    def open(self) -> None:
        pass

    def buffer(self, size: int) -> torch.Tensor:
        return self._buffers.next(size)

    def send(self, bucket: Bucket) -> None:
        # The bucket lives, and is not written, until all have answered, and an engine answers when its device has read.
        here = platform.current()
        here.synchronize()
        on_each(
            self.engines,
            lambda engine: engine.receive_shared(lambda: device_place(here.share_memory(bucket.flat)), bucket.specs),
        )

    def rest(self) -> None:
        # Whose turn is next (cluster.colocate) may need all of the device.
        self._buffers.made.clear()

    def close(self) -> None:
        self._buffers.made.clear()
