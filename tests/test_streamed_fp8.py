"""An fp8 engine that gets its weights bucket by bucket rounds them as one that loads a folder does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_checkpoints import VOCABULARY, save_checkpoint
from safetensors.torch import load_file, save_file

from megatron_vespo.rollout.reference.generator import Generator
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.parameters import parameters_by_hf_name
from megatron_vespo.rollout.reference.precision import Fp8
from megatron_vespo.rollout.reference.weights import WeightUpdates
from megatron_vespo.weights.buckets import Named, fill_buckets
from megatron_vespo.weights.fp8 import dequantise_blocks, is_block_quantised, quantise_blocks, quantise_stream
from megatron_vespo.weights.wire import Outgoing

FP8 = Fp8(weights=True)


@pytest.fixture
def updates(tmp_path: Path) -> WeightUpdates:
    folder = save_checkpoint(tmp_path / "first", seed=1, moe_intermediate_size=96)
    generator = Generator(ReferenceModel(folder, torch.float32, fp8=FP8), version=0, max_running=8)
    generator.start()
    generator.pause("retract").result()
    return WeightUpdates(generator)


def send(updates: WeightUpdates, tensors: Iterator[Named]) -> dict[str, str]:
    updates.begin()
    for bucket in fill_buckets(tensors, lambda size: torch.empty(size, dtype=torch.uint8), 1 << 16):
        updates.load(bucket.flat, bucket.specs)
    return updates.end()


def assert_computes(updates: WeightUpdates, folder: Path) -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, VOCABULARY, (2, 30)))
    expected = ReferenceModel(folder, torch.float32, fp8=FP8).score(tokens)
    torch.testing.assert_close(updates.generator.model.score(tokens), expected, atol=1e-6, rtol=0)


def test_buckets_and_deltas_are_rounded(updates: WeightUpdates, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "second", seed=2, moe_intermediate_size=96)
    tensors = load_file(folder / "model.safetensors")
    outgoing = Outgoing(delta=True)
    assert send(updates, outgoing.encode(tensors.items(), full=True)) == outgoing.checksums
    assert_computes(updates, folder)
    # One value of a block: it moves the scale, and with it what all others of the block are rounded to.
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = 4.0
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][7, 1] = 4.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sent = list(outgoing.encode(tensors.items(), full=False))
    assert len(sent) == 2 and all(name.startswith("delta:") for name, _ in sent)
    assert send(updates, iter(sent)) == outgoing.checksums
    assert_computes(updates, folder)


def test_weights_that_come_in_fp8_are_rounded_once(updates: WeightUpdates, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "second", seed=2, moe_intermediate_size=96)
    tensors = load_file(folder / "model.safetensors")
    send(updates, quantise_stream(tensors.items()))
    assert_computes(updates, folder)
    found = parameters_by_hf_name(updates.generator.model.module)
    for name, tensor in tensors.items():
        rounded = dequantise_blocks(*quantise_blocks(tensor)) if is_block_quantised(name) else tensor
        assert torch.equal(found[name], rounded), f"{name} was rounded again"
