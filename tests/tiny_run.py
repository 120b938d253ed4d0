"""A run small enough for a test: a random Qwen3-MoE with a tokenizer of characters, a few sums, a YAML file."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import yaml
from rank_slots import rank_slots
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

TESTS = Path(__file__).parent
CHARACTERS = ["<pad>", "<eos>", "<unk>", *sorted(set("0123456789+-*=() \\boxed{}abcdefghijklmnopqrstuvwxyz?.,"))]


def distinct_characters(response: str, answer: str) -> float:
    """A reward under which a random model's responses differ."""
    return len(set(response)) / 16


def make_checkpoint(folder: Path, **shape: Any) -> Path:
    """An HF folder: config, per-expert tensors, tokenizer with a chat template."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %} ="
    settings: dict[str, Any] = dict(
        vocab_size=len(CHARACTERS),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**settings | shape)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_problems(path: Path, count: int) -> Path:
    rows = [{"id": f"{path.stem}{i}", "problem": f"{i}+{i % 7}", "answer": str(i + i % 7)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Everything under ``folder``; returns the YAML file. ``sections`` are merged over the defaults."""
    model = make_checkpoint(folder / "model")
    config: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": str(write_problems(folder / "train.jsonl", 24)),
            "evaluate": str(write_problems(folder / "heldout.jsonl", 4)),
            "max_prompt_tokens": 32,
        },
        "rollout": {"engine": "reference", "precision": "fp32", "samples_per_prompt": 4, "max_response_tokens": 16},
        "reward": {"name": "tiny_run.distinct_characters", "workers": 1},
        "train": {"steps": 3, "prompts_per_step": 8, "mini_batches": 2, "tokens_per_micro_batch": 256},
        "optimizer": {"lr": 1.0e-3},
        "evaluate": {"samples_per_prompt": 2},
        "cluster": {"ranks_per_node": 2},
        "sync": {"probe_tolerance": 1.0e-4},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def slots_for(config: Path) -> AbstractContextManager[list[int]]:
    """Of a run's ranks; its process is to be started with them as ``pass_fds``."""
    return rank_slots(yaml.safe_load(config.read_text())["cluster"]["ranks_per_node"])


def start(config: Path, *overrides: str, new_session: bool = False) -> subprocess.Popen[str]:
    """``megatron-vespo train`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    with slots_for(config) as slots:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_vespo", "train", str(config), *overrides],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=new_session,
            pass_fds=slots,
        )


def train(config: Path, *overrides: str, timeout_s: float = 400) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a whole run."""
    process = start(config, *overrides)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def processes_about(text: str) -> list[int]:
    """Pids whose command line or log files name ``text``; zombies do not count."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                mentions = text in (entry / "cmdline").read_text() or text in os.readlink(entry / "fd" / "1")
            except OSError:
                continue
            if mentions:
                found.append(int(entry.name))
    return found


def descendants(parent: int) -> set[int]:
    """Pids of all processes below ``parent``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(above, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [parent]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.2)
