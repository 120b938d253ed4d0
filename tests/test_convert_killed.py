"""kill -9 in the middle of a conversion, the same command again, and the memory it took: processes of their own."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_config

from megatron_vespo.convert.partial import JOURNAL
from megatron_vespo.convert.placement import place
from megatron_vespo.convert.verify import verify

pytestmark = pytest.mark.slow

# Slowed down, so that there is a middle; then it says by how much its memory rose while it moved tensors.
CHILD = """
import re, sys, time
from megatron_vespo.cli import main
from megatron_vespo.convert import convert, files
write, transfer, pause, before = files.Files.write, convert._transfer, float(sys.argv[1]), []
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def measured(*arguments):
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew
    before.append(peak())
    return transfer(*arguments)
def slow(*arguments):
    time.sleep(pause)
    write(*arguments)
files.Files.write, convert._transfer = slow, measured
code = main(["convert", "to-megatron", *sys.argv[2:], "--workers", "2"])
print("rise", peak() - before[0])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MB in 250 tensors, the largest of 34 MB."""
    shape = dict(hidden_size=512, moe_intermediate_size=1024, num_hidden_layers=8, num_experts=8, vocab_size=16_411)
    config = tiny_config("moe", **shape, num_attention_heads=8, head_dim=64, dtype="float32")
    folder = tmp_path_factory.mktemp("killed") / "hf"
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    tensors = {n: torch.rand(p.shape, generator=generator) for n, p in place(config).tensors.items()}
    assert len(tensors) > 250 and sum(tensor.nbytes for tensor in tensors.values()) > 400e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def start(pause_s: float, hf: Path, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(pause_s), str(hf), str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_goes_on_and_takes_little_memory(hf: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.partial" / JOURNAL
    enough = random.Random(7).randrange(20, 120)
    first = start(0.03, hf, out)
    deadline = time.monotonic() + 200
    while not (journal.is_file() and journal.read_text().count("\n") > enough):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = len(journal.read_text().splitlines()) - 1
    assert not out.exists()

    second = start(0.0, hf, out)
    said, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    again = re.search(r"([\d,]+) of them were there already", said)
    assert again and done - 1 <= int(again[1]) <= done, said  # the last line may have been torn
    verdict = verify(hf, out, logits=False)
    assert verdict.problems == [] and verdict.bitwise == verdict.tensors == len(place_names(hf))
    rise = re.search(r"rise (\d+)", said)
    assert rise and int(rise[1]) < 34e6, said  # not even the largest tensor


def place_names(hf: Path) -> list[str]:
    with (hf / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in header if name != "__metadata__"]
