"""One sync of a mixture of experts to one engine, by each transport: time and peak memory at both ends.

    python benchmarks/weight_sync.py [--layers 8] [--repeats 3] [--only broadcast "delta 1%"]

copy            the weights, copied once in memory, tensor by tensor: what no transport can beat
disk            a folder in /dev/shm
broadcast       gloo over loopback
shared_memory   a file in memory
fp8             shared_memory, weights quantised on the sender in blocks of 128 x 128
delta N%        broadcast, N% of all elements changed by a unit in the last place since the version before

The shape is Qwen3-30B-A3B's in small: many experts, and so many tensors. The sender has whole HF tensors, as one rank's
export gives them: what is gathered over ranks before is not measured here (docs/weights.md). The engine is the
reference engine in a process of its own, with bfloat16 weights. Seconds are the best of the repeats, from the first
pause to the last resume, checksums included at both ends; cpu s are those of both processes. Memory is the peak above
the weights themselves, buffers and kept copies included: resident set, in which memory shared with the other process
counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memory import STEADY_ALLOCATOR, held_bytes, peak_bytes, reset_peak
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from megatron_vespo.rollout import launch_engine
from megatron_vespo.rollout.reference.parameters import parameters_by_hf_name
from megatron_vespo.rollout.weight_routes import engine_weights
from megatron_vespo.weights.sync import EngineWeights, SyncReport, WeightTransport
from megatron_vespo.weights.transports.broadcast import Broadcast
from megatron_vespo.weights.transports.disk import DiskTransport
from megatron_vespo.weights.transports.shared_memory import SharedMemory
from megatron_vespo.weights.transports.streamed import StreamedTransport

MIB = 1 << 20
BUCKET = 64 * MIB
SHARES = ("0.1%", "1%", "5%", "50%", "100%")
ROWS = ("copy", "disk", "broadcast", "shared_memory", "fp8", *(f"delta {share}" for share in SHARES))


def write_checkpoint(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """A random Qwen3-MoE in bfloat16 whose tensors have the names and the proportions of Qwen3-30B-A3B's."""
    config = Qwen3MoeConfig(
        vocab_size=32_000,
        hidden_size=768,
        moe_intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=96,
        num_experts=64,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    with torch.device("meta"):
        shapes = parameters_by_hf_name(AutoModelForCausalLM.from_config(config))
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(t.shape, generator=generator).mul_(0.02).bfloat16() for n, t in shapes.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.dtype = "bfloat16"
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    return weights


def nudge(weights: dict[str, torch.Tensor], share: float, generator: torch.Generator) -> None:
    for tensor in weights.values():
        drawn = torch.empty(tensor.shape, dtype=torch.int16).random_(0, 1 << 15, generator=generator)
        step = (drawn & 1) * 2 - 1
        tensor.view(torch.int16).add_(step.mul_(drawn < share * (1 << 15)))


def transport_of(row: str, engines: list[EngineWeights], folder: Path) -> WeightTransport:
    if row == "disk":
        return DiskTransport(engines, folder / "sync", folder / "model", bucket_bytes=BUCKET)
    if row in ("shared_memory", "fp8"):
        return StreamedTransport(engines, SharedMemory(engines), bucket_bytes=BUCKET, fp8=row == "fp8")
    channel = Broadcast(engines, address="127.0.0.1", backend="gloo", device=torch.device("cpu"), timeout_s=120)
    return StreamedTransport(engines, channel, bucket_bytes=BUCKET, delta=row.startswith("delta"))


class Watched:
    """Another process since the watch began: peak memory above what it held then, processor time. See proc(5)."""

    def __init__(self, pid: int) -> None:
        self.folder = Path(f"/proc/{pid}")

    def start(self) -> None:
        (self.folder / "clear_refs").write_text("5")
        self.memory, self.cpu = self._field("VmRSS"), self._cpu_s()

    def rise(self) -> int:
        return self._field("VmHWM") - self.memory

    def cpu_s(self) -> float:
        return self._cpu_s() - self.cpu

    def _field(self, name: str) -> int:
        lines = (self.folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    def _cpu_s(self) -> float:
        fields = (self.folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(row: str, layers: int, repeats: int) -> dict[str, Any]:
    """In a process of its own: seconds, bytes sent, and rises of memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        weights = write_checkpoint(folder / "model", layers)
        if row == "copy":
            return copied(weights, repeats)
        engine = launch_engine("reference", folder / "model", log_file=folder / "log", precision="bf16")
        try:
            assert engine._process is not None
            watched = Watched(max(engine._process.pids()))
            transport = transport_of(row, [engine_weights("reference", engine.url, 600)], folder)
            found = list(synced(row, transport, weights, watched, repeats))
            transport.close()
        finally:
            engine.shutdown()
    return min(found, key=lambda one: one["seconds"]) | {
        memory: max(one[memory] for one in found) for memory in ("sender", "engine")
    }


def synced(
    row: str, transport: WeightTransport, weights: dict[str, torch.Tensor], watched: Watched, repeats: int
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    before = held_bytes()
    share = float(row.removeprefix("delta ").rstrip("%")) / 100 if row.startswith("delta") else 0.01
    transport.publish(0, iter(weights.items()))  # connects; for deltas, the version they are made against
    for version in range(1, repeats + 1):
        nudge(weights, share, generator)
        reset_peak()
        watched.start()
        cpu = time.process_time()
        report: SyncReport = transport.publish(version, iter(weights.items()))
        assert report.checked == report.tensors
        yield {
            "seconds": report.seconds,
            "cpu": time.process_time() - cpu + watched.cpu_s(),
            "bytes": report.bytes,
            "sender": peak_bytes() - before,
            # It was watched from after the first sync, which left a copy for deltas.
            "engine": watched.rise() + (report.full_bytes if row.startswith("delta") else 0),
            "tensors": report.tensors,
        }


def copied(weights: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """Into memory that is there already, as an engine's is."""
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    seconds = []
    cpu = time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        for name, tensor in weights.items():
            copies[name].copy_(tensor)
        seconds.append(time.perf_counter() - start)
    size = sum(tensor.nbytes for tensor in weights.values())
    cpu = (time.process_time() - cpu) / repeats
    return {"seconds": min(seconds), "cpu": cpu, "bytes": size, "sender": 0, "engine": 0, "tensors": len(weights)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--in-this-process", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if row := options.in_this_process:
        print(json.dumps(measure(row, options.layers, options.repeats)))
        return

    first: dict[str, Any] = {}
    for row in dict.fromkeys(["copy", *options.only]):
        command = [sys.executable, __file__, *sys.argv[1:], "--in-this-process", row]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | STEADY_ALLOCATOR)
        if process.returncode:
            print(f"{row:15}could not run: exit code {process.returncode}")
            continue
        found = json.loads(process.stdout.splitlines()[-1])
        if not first:
            first = found
            print(
                f"{first['bytes'] / 1e9:.2f} GB of bfloat16 in {first['tensors']} tensors, buckets of {BUCKET // MIB} "
                f"MiB, one core at each end, torch {torch.__version__}\n"
                f"{'':15}{'seconds':>8}{'x copy':>8}{'cpu s':>8}{'x copy':>8}{'MB sent':>9}{'of all':>8}"
                f"{'sender MB':>11}{'engine MB':>11}"
            )
        print(
            f"{row:15}{found['seconds']:8.2f}{found['seconds'] / first['seconds']:8.1f}"
            f"{found['cpu']:8.2f}{found['cpu'] / first['cpu']:8.1f}{found['bytes'] / 1e6:9.1f}"
            f"{found['bytes'] / first['bytes']:8.1%}{found['sender'] / 1e6:11.0f}{found['engine'] / 1e6:11.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
