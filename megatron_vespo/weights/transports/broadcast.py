"""Buckets broadcast from the sender to every engine process at once: NCCL between GPUs, gloo otherwise."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
from torch.distributed import DistStoreError, TCPStore

from megatron_vespo.weights.buckets import Bucket, ByTurns
from megatron_vespo.weights.groups import BroadcastGroup, has_joined, open_store
from megatron_vespo.weights.sync import EngineWeights, SyncError, at_once, on_each

_GROUPS = itertools.count()


class Broadcast:
    """A :class:`~.streamed.Channel`: one group of the sender, as rank 0, and all processes of all engines."""

    needs_plugin = False

    def __init__(
        self, engines: Sequence[EngineWeights], *, address: str, backend: str, device: torch.device, timeout_s: float
    ) -> None:
        """``address``: of this machine, as the engines can reach it. ``timeout_s``: for all engines to join, and for a
        bucket to reach all."""
        self.engines, self.address, self.backend, self.device = engines, address, backend, device
        self.timeout = timedelta(seconds=timeout_s)
        self.group = ""
        self._store: TCPStore
        self._members: BroadcastGroup | None = None
        self._buffers = ByTurns(lambda size: torch.empty(size, dtype=torch.uint8, device=device))

    def open(self) -> None:
        """Raises SyncError naming the engines that did not come in time."""
        if self._members is not None:
            return
        sizes = on_each(self.engines, lambda engine: engine.ranks())
        *firsts, size = itertools.accumulate(sizes, initial=1)
        self.group = f"weights-{os.getpid()}-{next(_GROUPS)}"
        self._store = open_store(self.address, self.timeout)
        port = self._store.port

        def join(engine: EngineWeights, first: int) -> None:
            engine.join_broadcast(self.group, self.address, port, first, size, self.backend)

        def wait_for_all() -> None:
            self._members = BroadcastGroup(self.group, self._store, 0, size, self.backend, self.timeout)

        joins: list[Callable[[], None]] = [partial(join, *each) for each in zip(self.engines, firsts, strict=True)]
        try:
            at_once([wait_for_all, *joins])
        except DistStoreError as error:
            absent = [
                engine.url
                for engine, first, ranks in zip(self.engines, firsts, sizes, strict=True)
                if not all(has_joined(self._store, rank) for rank in range(first, first + ranks))
            ]
            del self._store  # so that those who did come wait no longer
            raise SyncError(
                f"{', '.join(absent) or 'an engine'} did not join the broadcast of weights within "
                f"{self.timeout.total_seconds():g} s (sync.timeout_s); can it reach {self.address}:{port}?"
            ) from error.with_traceback(None)  # whose frames hold the store

    def buffer(self, size: int) -> torch.Tensor:
        return self._buffers.next(size)

    def send(self, bucket: Bucket) -> None:
        members = self._members
        assert members is not None, "open comes first"

        def receive(engine: EngineWeights) -> None:
            engine.receive_broadcast(self.group, bucket.specs)

        at_once([partial(members.broadcast, bucket.flat), *(partial(receive, engine) for engine in self.engines)])

    def rest(self) -> None:
        pass

    def close(self) -> None:
        if self._members is not None:
            on_each(self.engines, lambda engine: engine.leave_broadcast(self.group))
            del self._store
        self._members = None
        self._buffers.made.clear()
