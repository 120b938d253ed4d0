"""Weights bucket by bucket into paused engines, through a channel: a broadcast, shared memory or device memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from megatron_vespo.weights.buckets import Bucket, Named, fill_buckets
from megatron_vespo.weights.fp8 import quantise_stream
from megatron_vespo.weights.sync import EngineWeights, SyncError, SyncReport, on_each, prove
from megatron_vespo.weights.wire import Outgoing


class Channel(Protocol):
    """How one bucket gets to all engines."""

    needs_plugin: bool
    """Whether stock SGLang cannot take it (rollout/sglang_plugin.py)."""

    def open(self) -> None:
        """Called before each sync; connects where that has not been done."""

    def buffer(self, size: int) -> torch.Tensor:
        """uint8 [size] to fill the next bucket in; there are two, by turns."""

    def send(self, bucket: Bucket) -> None:
        """Returns when every engine has loaded it, and its buffer may be written again."""

    def rest(self) -> None:
        """Called after each sync: give up what costs little to have again."""

    def close(self) -> None: ...


class StreamedTransport:
    """The sender holds ``bucket_bytes``, one whole tensor and, for deltas, the last version in host memory.

    (Where a tensor is larger than half a bucket, its own buffer is as large as it is, while it is on its way.)
    """

    def __init__(
        self,
        engines: Sequence[EngineWeights],
        channel: Channel,
        *,
        bucket_bytes: int,
        delta: bool = False,
        fp8: bool = False,
    ) -> None:
        """``fp8``: the engines compute with weights in fp8 blocks, which are made here and take half the bytes."""
        self.engines, self.channel, self.bucket_bytes, self.fp8 = engines, channel, bucket_bytes, fp8
        self.outgoing = Outgoing(delta=delta)

    def publish(self, version: int, tensors: Iterable[Named]) -> SyncReport:
        tensors = iter(tensors)
        try:
            return self._publish(version, tensors)
        except BaseException:
            for _ in tensors:  # the other ranks gather along, and may be asked for the next attempt then
                pass
            raise

    def _publish(self, version: int, tensors: Iterator[Named]) -> SyncReport:
        start = time.perf_counter()
        self.channel.open()
        on_each(self.engines, lambda engine: engine.pause())
        full = self._must_send_all(on_each(self.engines, lambda engine: engine.begin_update()))
        stream = self.outgoing.encode(quantise_stream(tensors) if self.fp8 else tensors, full=full)
        size = self._send(fill_buckets(stream, self.channel.buffer, self.bucket_bytes // 2))
        arrived = on_each(self.engines, lambda engine: engine.end_update())
        sent = self.outgoing.checksums
        checked = prove(self.engines, sent, arrived)
        on_each(self.engines, lambda engine: engine.set_version(version))
        on_each(self.engines, lambda engine: engine.resume())
        self.channel.rest()
        return SyncReport(version, time.perf_counter() - start, size, self.outgoing.full_bytes, len(sent), checked)

    def close(self) -> None:
        self.channel.close()

    def _send(self, buckets: Iterable[Bucket]) -> int:
        """Bytes sent. While the engines load one half of a bucket, the other is filled."""
        size = 0
        with ThreadPoolExecutor(1) as thread:
            sending: Future[None] | None = None
            for bucket in buckets:
                if sending is not None:
                    sending.result()
                sending = thread.submit(self.channel.send, bucket)
                size += len(bucket.flat)
            if sending is not None:
                sending.result()
        return size

    def _must_send_all(self, kept: Sequence[str | None]) -> bool:
        """Whether an engine keeps another version than the one a delta would be made against, or none."""
        for engine, base in zip(self.engines, kept, strict=True):
            if base is None and (self.outgoing.delta or self.channel.needs_plugin):
                raise SyncError(
                    f"{engine.url} is an SGLang without the plugin of megatron_vespo, which sync.delta=true and "
                    "sync.transport=shared_memory or ipc need: install megatron_vespo beside it, or change these"
                )
        return any(base is None or base != self.outgoing.base() for base in kept)
