"""Transports to engines in this process, with small buckets; versions to send, and what arrived otherwise than sent.

conftest.py has the engines, the versions and the device memory that they share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_here import EngineHere
from safetensors.torch import load_file

from megatron_vespo.weights.sync import WeightTransport
from megatron_vespo.weights.transports.broadcast import Broadcast
from megatron_vespo.weights.transports.device_memory import DeviceMemory
from megatron_vespo.weights.transports.disk import DiskTransport
from megatron_vespo.weights.transports.shared_memory import SharedMemory
from megatron_vespo.weights.transports.streamed import StreamedTransport

Weights = dict[str, torch.Tensor]
STREAMED = ("broadcast", "shared_memory", "ipc")
SMALL = 200_000
"""Bytes of a bucket: a fifth of the model, less than its largest tensors do not exist for it."""


def three_versions(folders: tuple[Path, Path]) -> list[Weights]:
    """Two that have nothing in common, and the second with a few elements nudged."""
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    generator = torch.Generator().manual_seed(1)
    third = {name: tensor.clone() for name, tensor in second.items()}
    for tensor in third.values():
        tensor.view(torch.int32)[torch.rand(tensor.shape, generator=generator) < 0.02] += 1
    return [first, second, third]


def transport_to(
    kind: str, engines: list[EngineHere], tmp_path: Path, source: Path, timeout_s: float = 20, **options: Any
) -> WeightTransport:
    weights = [engine.weights for engine in engines]
    if kind == "disk":
        return DiskTransport(weights, tmp_path / "sync", source)
    cpu = torch.device("cpu")
    channel = {
        "broadcast": lambda: Broadcast(weights, address="127.0.0.1", backend="gloo", device=cpu, timeout_s=timeout_s),
        "shared_memory": lambda: SharedMemory(weights),
        "ipc": lambda: DeviceMemory(weights),
    }[kind]()
    return StreamedTransport(weights, channel, bucket_bytes=SMALL, **options)


def differing(engine: EngineHere, expected: Weights) -> list[str]:
    found = engine.tensors()
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in expected.items()
        if not np.array_equal(tensor.contiguous().view(torch.uint8), found[name].contiguous().view(torch.uint8))
    ]
