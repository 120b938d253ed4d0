"""The sending end of the weight sync: the transport that the config names, in rank 0 of the trainer."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import ray
import torch

from megatron_vespo import platform
from megatron_vespo.cluster.ray_cluster import spans_nodes
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.rollout.protocol import EngineError
from megatron_vespo.rollout.weight_routes import engine_weights
from megatron_vespo.weights.sync import WeightTransport
from megatron_vespo.weights.transports.broadcast import Broadcast
from megatron_vespo.weights.transports.device_memory import DeviceMemory
from megatron_vespo.weights.transports.disk import DiskTransport
from megatron_vespo.weights.transports.shared_memory import SharedMemory
from megatron_vespo.weights.transports.streamed import Channel, StreamedTransport

MIB = 1 << 20
VERSIONS_AT_ONCE = 3
"""In the disk transport's folder: the one being written, and the two that it keeps."""


class WeightSender:
    """Keeps the transport, and what it remembers for deltas, as long as the engines are the same."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._urls: tuple[str, ...] = ()
        self._transport: WeightTransport | None = None

    def to(self, urls: Sequence[str], key: str | None) -> WeightTransport:
        """The transport to these engines. One that was restarted has another address, and all are connected anew."""
        if self._transport is None or self._urls != tuple(urls):
            if self._transport is not None:
                with contextlib.suppress(EngineError):  # the one that is gone
                    self._transport.close()
            self._transport = build_transport(self.config, urls, key)
            self._urls = tuple(urls)
        return self._transport


def build_transport(config: RunConfig, urls: Sequence[str], key: str | None = None) -> WeightTransport:
    """``key``: the bearer token that the engines want."""
    sync, rollout = config.sync, config.rollout
    engines = [engine_weights(rollout.engine, url, rollout.request_timeout_s, key) for url in urls]
    bucket_bytes, fp8 = sync.bucket_mb * MIB, rollout.precision == "fp8"
    if sync.transport == "disk":
        blocks = fp8 and rollout.engine == "sglang"  # the reference engine rounds what it reads
        return DiskTransport(engines, sync_folder(config), config.model.path, bucket_bytes=bucket_bytes, fp8=blocks)
    here = platform.current()
    on_cpu = rollout.engine == "reference"  # whatever the trainer runs on
    channel: Channel
    if sync.transport == "ipc" and here.has_own_memory and not on_cpu:
        channel = DeviceMemory(engines)
    elif sync.transport in ("ipc", "shared_memory"):
        channel = SharedMemory(engines)
    else:
        channel = Broadcast(
            engines,
            address=ray.util.get_node_ip_address(),
            backend="gloo" if on_cpu else here.distributed_backend,
            device=torch.device("cpu") if on_cpu else here.device,
            timeout_s=sync.timeout_s,
        )
    return StreamedTransport(engines, channel, bucket_bytes=bucket_bytes, delta=sync.delta, fp8=fp8)


def sync_folder(config: RunConfig) -> Path:
    """Where weights are handed over: memory that one node's processes share, or the run's folder between nodes."""
    directory, shared = config.directory.resolve(), Path("/dev/shm")
    if config.sync.folder is not None:
        return config.sync.folder.resolve()
    if spans_nodes(config) or not shared.is_dir() or not _has_room(shared, config.model.path):
        return directory / "sync"
    return shared / f"megatron_vespo-{directory.as_posix().strip('/').replace('/', '-')}"


def _has_room(shared: Path, model: Path) -> bool:
    """By the size of the memory's file system, not by what is free of it now: the answer is the same all the run."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return shutil.disk_usage(shared).total >= VERSIONS_AT_ONCE * weights
