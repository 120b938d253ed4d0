"""Seconds that training stands still for a checkpoint: written beside the training, and waited for.

    python benchmarks/checkpoint.py [--hidden 512] [--layers 8] [--updates 4] [--repeats 3]

One rank trains a random Qwen3-MoE in float32 (weights and two moments: 12 bytes a parameter). A row is ``--updates``
updates with one checkpoint begun before the first of them:

none        no checkpoint
waited      training waits until it is on disk, digests and all (checkpoint.background: false)
background  training waits for the copy in host memory alone (the default)

``stands still`` is the time before the first update; ``updates`` the time of the updates, which the writing beside them
makes slower where it takes their cores. Rows take turns; seconds are medians of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from megatron_vespo import platform
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.policy.checkpoint import seal
from megatron_vespo.policy.checkpoint_folder import commit
from megatron_vespo.policy.trainer import PolicyTrainer
from megatron_vespo.samples.records import Prompt, Sample

ROWS = ("none", "waited", "background")


def a_trainer(folder: Path, hidden: int, layers: int) -> PolicyTrainer:
    shape = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        moe_intermediate_size=hidden // 2,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        num_experts=16,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    config = RunConfig.model_validate(
        {
            "name": "checkpoint",
            "run_dir": folder,
            "model": {"path": folder / "model", "dtype": "float32"},
            "data": {"train": folder},
            "train": {"tokens_per_micro_batch": 2048},
            "cluster": {"ranks_per_node": 1},
        }
    )
    platform.current().prepare_megatron(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return PolicyTrainer(config)


def some_samples(count: int = 8, length: int = 128) -> list[Sample]:
    random = np.random.default_rng(0)
    samples = []
    for i in range(count):
        prompt, response = (random.integers(3, 4096, n).astype(np.int32) for n in (16, length))
        logprobs = np.full(length, -8.0, np.float32)
        fields: dict[str, Any] = dict(rollout_logprobs=logprobs, old_logprobs=logprobs, advantage=random.normal())
        fields |= dict(weight_versions=np.zeros(length, np.int32), loss_mask=np.ones(length, bool))
        sample = Sample(str(i), Prompt(str(i), prompt, "", ""), response, finish_reason="stop", **fields)
        samples.append(sample)
    return samples


def write(trainer: PolicyTrainer, folder: Path) -> None:
    written = trainer.write_snapshot()
    assert trainer.snapshot is not None
    seal(trainer.snapshot, trainer.hf_config, {}, [written])
    commit(folder)


def measured(trainer: PolicyTrainer, row: str, folder: Path, updates: int) -> tuple[float, float, float, float]:
    """Seconds that training stands still, of its updates, and until the checkpoint is committed; processor seconds."""
    samples = some_samples()
    start, used = time.perf_counter(), time.process_time()
    ended = [start]

    def save() -> None:
        write(trainer, folder)
        ended.append(time.perf_counter())

    writer = threading.Thread(target=save)
    if row != "none":
        trainer.take_snapshot(folder)
        writer.start()
    if row == "waited":
        writer.join()
    still = time.perf_counter()
    for _ in range(updates):
        trainer.train_mini_batch(samples)
    trained = time.perf_counter()
    if row != "none":
        writer.join()
    return still - start, trained - still, ended[-1] - start, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, ...]]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        trainer = a_trainer(folder, options.hidden, options.layers)
        trainer.train_mini_batch(some_samples())  # megatron-core saves no optimizer that has not made a step
        for _ in range(options.repeats):
            for row in ROWS:
                found[row].append(measured(trainer, row, folder / "checkpoints" / "step_000001", options.updates))
        size = sum(path.stat().st_size for path in (folder / "checkpoints" / "step_000001").iterdir())
    print(f"checkpoint of {size / 2**20:.0f} MiB, {options.updates} updates")
    print(f"{'':12}{'stands still s':>16}{'updates s':>12}{'on disk after s':>18}{'cpu s':>8}")
    medians = {row: [statistics.median(column) for column in zip(*found[row], strict=True)] for row in ROWS}
    for row, (still, updates, on_disk, cpu) in medians.items():
        print(f"{row:12}{still:16.3f}{updates:12.2f}{on_disk:18.2f}{cpu:8.1f}")
    still, whole = (medians[row][0] for row in ("background", "waited"))
    longer = {row: sum(medians[row][:2]) - sum(medians["none"][:2]) for row in ("background", "waited")}
    print(f"stands still for {still / whole:.2f} of the time; the save costs training", end=" ")
    print(f"{longer['background']:.2f} s in all in the background, {longer['waited']:.2f} s waited for")


if __name__ == "__main__":
    main()
