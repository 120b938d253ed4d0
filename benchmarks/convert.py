"""Conversion of a synthetic MoE checkpoint both ways, against copying the same bytes on the same disk in the same run.

    python benchmarks/convert.py                    # about 4 GB, in runs/bench_convert
    python benchmarks/convert.py --gb 0.5           # a trial
    python benchmarks/convert.py --bridge PYTHON    # also megatron-bridge, in an environment of its own

Every line reads its source, writes its target and waits until that is on the disk (fsync). Copies come before each
conversion; all lines are compared with the median copy. ``moving`` leaves out what does not grow with the bytes:
imports and planning. Caches are left as they are (sources of this size mostly lie in memory) unless --drop-caches,
which needs root, empties them before every line. megatron-bridge is used plainly: import_ckpt, and export_ckpt
(docs/weights.md tells what it takes to install it; this was not run with it).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

LAYER = dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768)
EXPERTS, VOCABULARY = 64, 32_768
BRIDGE = """
import sys
from megatron.bridge import AutoBridge
source, middle, target = sys.argv[1:]
if target == "-":
    AutoBridge.import_ckpt(source, middle)
else:
    AutoBridge.from_hf_pretrained(source).export_ckpt(middle, target)
"""


@dataclass
class Line:
    what: str
    seconds: float
    moving: float
    """Seconds of it, without imports and planning."""
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_convert"), help="on the disk to measure")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--drop-caches", action="store_true", help="before every line; needs root")
    parser.add_argument("--bridge", type=Path, metavar="PYTHON", help="one that can import megatron.bridge")
    options = parser.parse_args()
    root: Path = options.folder
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    try:
        measure(options, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def measure(options: argparse.Namespace, root: Path) -> None:
    nbytes = make_checkpoint(root / "hf", options.gb)
    convert = [sys.executable, "-m", "megatron_vespo", "convert"]
    workers = ["--workers", str(options.workers)]
    steps = [
        ("to-megatron", [*convert, "to-megatron", str(root / "hf"), str(root / "megatron"), *workers]),
        ("to-hf", [*convert, "to-hf", str(root / "megatron"), str(root / "back"), *workers]),
    ]
    if options.bridge:
        bridge = [str(options.bridge), "-c", BRIDGE, str(root / "hf"), str(root / "bridge")]
        steps += [("bridge, in", [*bridge, "-"]), ("bridge, out", [*bridge, str(root / "bridge_back")])]
    lines: dict[str, list[Line]] = {}
    for _ in range(options.repeats):
        for what, command in steps:
            source = root / ("hf" if what.endswith(("to-megatron", "in")) else "megatron")
            copied = copy(source, root / "copy", options)
            shutil.rmtree(root / "copy")  # what caches hold of it would make the conversion read from the disk
            for line in (copied, run(what, command, options)):
                lines.setdefault(line.what, []).append(line)
        same = checksums(root / "megatron") == checksums(root / "back")
        for folder in root.iterdir():
            if folder.name != "hf":
                shutil.rmtree(folder)

    copies = [line.seconds for found in lines.values() for line in found if line.what.startswith("copy")]
    plain, gb = statistics.median(copies), nbytes / 1e9
    caches = "dropped" if options.drop_caches else "as they are"
    print(f"\n{gb:.2f} GB bf16, {options.workers} workers, {os.cpu_count()} cores, caches {caches}")
    print(f"load {os.getloadavg()[0]:.1f}; back bitwise, by the checksums of every tensor: {same}")
    print(f"medians of {options.repeats}; all {len(copies)} copies took {min(copies):.2f} to {max(copies):.2f} s\n")
    print("| | seconds | GB/s | moving, GB/s | of a copy: whole, moving | peak RSS, MB |\n|---|---|---|---|---|---|")
    for what, found in lines.items():
        seconds, moving = (statistics.median(getattr(line, name) for line in found) for name in ("seconds", "moving"))
        ratios = f"{plain / seconds:.2f}, {plain / moving:.2f}"
        peak = max(line.peak_mb for line in found)
        print(f"| {what} | {seconds:.2f} | {gb / seconds:.2f} | {gb / moving:.2f} | {ratios} | {peak:.0f} |")


def make_checkpoint(folder: Path, gb: float) -> int:
    """A Qwen3-MoE of released proportions, random weights, one file a layer; returns its bytes."""
    folder.mkdir()
    hidden, width = LAYER["hidden_size"], LAYER["moe_intermediate_size"]
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (4096, hidden),
        "self_attn.k_proj": (512, hidden),
        "self_attn.v_proj": (512, hidden),
        "self_attn.o_proj": (hidden, 4096),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
        "mlp.gate": (EXPERTS, hidden),
    }
    for expert in range(EXPERTS):
        for name, shape in (
            ("gate_proj", (width, hidden)),
            ("up_proj", (width, hidden)),
            ("down_proj", (hidden, width)),
        ):
            shapes[f"mlp.experts.{expert}.{name}"] = shape
    outside = {name: (VOCABULARY, hidden) for name in ("model.embed_tokens", "lm_head")} | {"model.norm": (hidden,)}
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    layers = max(1, round((gb * 1e9 - 4 * VOCABULARY * hidden) / layer_bytes))
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, num_experts=EXPERTS, num_experts_per_tok=8,
        intermediate_size=6144, tie_word_embeddings=False, dtype="bfloat16", **LAYER,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = np.random.default_rng(1)
    groups = [outside, *({f"model.layers.{i}.{name}": shape for name, shape in shapes.items()} for i in range(layers))]
    weight_map, total = {}, 0
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {f"{name}.weight": random_bf16(generator, shape) for name, shape in group.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_bf16(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Any sign and mantissa, magnitudes between 2**-7 and 2**-6: quick to make."""
    bits = np.frombuffer(generator.bytes(2 * int(np.prod(shape))), dtype=np.uint16)
    return torch.from_numpy((bits & 0x807F) | 0x3C00).view(torch.bfloat16).view(shape)


def copy(source: Path, target: Path, options: argparse.Namespace) -> Line:
    prepare(options)
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    return Line(f"copy of {source.name}", seconds, seconds, 0.0)


def run(what: str, command: list[str], options: argparse.Namespace) -> Line:
    prepare(options)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    watch = PeakMemory(process.pid)
    out, _ = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])} failed with {process.returncode}\n{out}")
    told = re.search(r"GB in ([\d.]+) s", out)
    return Line(what, seconds, float(told[1]) if told else seconds, watch.stop() / 1e6)


def prepare(options: argparse.Namespace) -> None:
    os.sync()
    if options.drop_caches:
        Path("/proc/sys/vm/drop_caches").write_text("3")


class PeakMemory:
    """The largest sum of resident sets of a process and all below it, looked at every 20 ms."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._end = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self._peak = max(self._peak, resident(self._pid))

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self._peak


def resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def checksums(folder: Path) -> dict[str, str]:
    tensors = json.loads((folder / "checksums.json").read_text())["tensors"]
    return {name: entry["checksum"] for name, entry in tensors.items()}


if __name__ == "__main__":
    main()
