"""From two Megatron ranks under any split, by any transport, an engine ends up with the checkpoint to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_here import EngineHere, engine_here
from hf_checkpoints import build, hf_config, write_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import tiny_hf_model
from transformers import AutoConfig

from megatron_vespo import platform
from megatron_vespo.weights.buckets import Named
from megatron_vespo.weights.export import export_hf
from megatron_vespo.weights.load import load_hf
from megatron_vespo.weights.sync import WeightTransport
from megatron_vespo.weights.transports.broadcast import Broadcast
from megatron_vespo.weights.transports.disk import DiskTransport
from megatron_vespo.weights.transports.shared_memory import SharedMemory
from megatron_vespo.weights.transports.streamed import StreamedTransport

pytestmark = pytest.mark.slow

SPLITS: list[dict[str, Any]] = [
    dict(tensor=2, sequence=True),
    dict(expert=2),
    dict(pipeline=2),
    dict(tensor=2, sequence=True, expert=2),
    dict(expert_tensor=2),
]
TRANSPORTS = ("disk", "broadcast", "broadcast delta", "shared_memory", "shared_memory delta")
STEP = 1 + 2**-20


def moved(weight: torch.Tensor) -> torch.Tensor:
    """One element in 16, known by its bits, is changed by a few units in the last place."""
    return torch.where(weight.view(torch.int32) & 15 == 0, weight * STEP, weight)


def transport_to(kind: str, engine: EngineHere, source: Path, folder: Path) -> WeightTransport:
    name, _, delta = kind.partition(" ")
    if name == "disk":
        return DiskTransport([engine.weights], folder, source)
    channel = (
        Broadcast([engine.weights], address="127.0.0.1", backend="gloo", device=torch.device("cpu"), timeout_s=60)
        if name == "broadcast"
        else SharedMemory([engine.weights])
    )
    return StreamedTransport([engine.weights], channel, bucket_bytes=20_000, delta=bool(delta))


def two_versions(chunks: list[Any], source: Path, publish: Callable[[int, Iterable[Named]], None]) -> None:
    """Publishes the checkpoint, and then the same with some weights changed a little."""
    config = AutoConfig.from_pretrained(source)
    load_hf(chunks, source)
    publish(1, export_hf(chunks, config))
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(moved(parameter))
    publish(2, export_hf(chunks, config))


@dataclass
class Watched:
    """A transport to an engine, and what the engine had wrong after a version."""

    transport: WeightTransport
    engine: EngineHere
    expected: dict[int, dict[str, torch.Tensor]]
    delta: bool
    wrong: list[str] = field(default_factory=list)

    def publish(self, version: int, tensors: Iterable[Named]) -> None:
        report, expected = self.transport.publish(version, tensors), self.expected[version]
        self.wrong += [f"{version}: {n}" for n, t in self.engine.tensors().items() if not torch.equal(t, expected[n])]
        self.wrong += ["unproven"] * (report.tensors - report.checked)
        if self.delta and version == 2 and report.bytes > report.full_bytes / 2:
            self.wrong.append(f"not a delta: {report}")


def two_ranks(source: Path, other: Path, folder: Path) -> dict[tuple[str, str], list[str]]:
    """(split, transport) -> what came out wrong; {} off rank 0."""
    platform.current().prepare_megatron(1)
    first = load_file(source / "model.safetensors")
    expected = {1: first, 2: {name: moved(tensor) for name, tensor in first.items()}}
    results: dict[tuple[str, str], list[str]] = {}
    for split in SPLITS:
        chunks, _ = build(source, **split)
        for kind in TRANSPORTS:
            if dist.get_rank() != 0:
                two_versions(chunks, source, exhaust)
                continue
            with engine_here(other) as engine:
                transport = transport_to(kind, engine, source, folder)
                watched = Watched(transport, engine, expected, "delta" in kind)
                two_versions(chunks, source, watched.publish)
                transport.close()
            results[str(split), kind] = watched.wrong
    return results


def exhaust(version: int, tensors: Iterable[Named]) -> None:
    assert list(tensors) == [], "only rank 0 is given tensors"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    root = tmp_path_factory.mktemp("layouts")
    source = write_checkpoint(root / "source", "qwen3_moe")
    torch.manual_seed(77)
    other = root / "other"
    model = tiny_hf_model(hf_config("qwen3_moe"), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(other)
    return run_ranks(two_ranks, 2, source, other, root / "sync", timeout_s=400)[0]


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: " ".join(f"{k}={v}" for k, v in split.items()))
def test_an_engine_has_the_senders_weights(
    split: dict[str, Any], kind: str, found: dict[tuple[str, str], list[str]]
) -> None:
    assert found[str(split), kind] == []
