"""Converted checkpoints under megatron-core's own loader and any layout; and what megatron-core saved, converted."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_checkpoints import build, differences, write_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file

from megatron_vespo import platform
from megatron_vespo.convert.convert import to_hf, to_megatron
from megatron_vespo.convert.verify import verify
from megatron_vespo.weights.mapping import WeightsError

pytestmark = pytest.mark.slow

MOE = "qwen3_moe bfloat16"
SPLITS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3 tied", dict(tensor=2)),
    ("qwen3 tied", dict(pipeline=2)),
    (MOE, dict(tensor=2, sequence=True, expert=2)),
    (MOE, dict(tensor=2, sequence=True, expert_tensor=2)),
    (MOE, dict(pipeline=2, virtual_pipeline=2)),
    ("glm4_moe", dict(tensor=2, sequence=True)),
    ("glm4_moe", dict(pipeline=2)),
    ("deepseek_v3", dict(expert=2)),
    ("deepseek_v3", dict(tensor=2, sequence=True)),
]
SAVED = {"qwen3 tied": dict(tensor=2), MOE: dict(tensor=2, sequence=True, expert_tensor=2)}
"""Under which layout megatron-core saves a kind. The vocabulary of 101 is padded, and what is row-parallel cut."""


def compare_loads(folders: dict[str, tuple[Path, Path]], saved: dict[str, Path]) -> list[list[str]]:
    """For each split, the parameters and buffers of this rank that the two ways of loading fill otherwise."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy

    from megatron_vespo.policy.checkpoint import load_weights, sharded_weights
    from megatron_vespo.weights.load import load_hf

    platform.current().prepare_megatron(1)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the saver has a child
    wrong = []
    for kind, split in SPLITS:
        hf, megatron = folders[kind]
        chunks, _ = build(hf, **split)
        load_hf(chunks, hf)
        expected = [{name: tensor.clone() for name, tensor in tensors(chunk)} for chunk in chunks]
        with torch.no_grad():
            for chunk in chunks:
                for _, tensor in tensors(chunk):
                    tensor.fill_(float("nan"))
        load_weights(megatron, chunks)
        wrong.append(
            [
                name
                for chunk, wanted in zip(chunks, expected, strict=True)
                for name, tensor in tensors(chunk)
                if not torch.equal(tensor, wanted[name])
            ]
        )
        if SAVED.get(kind) == split:
            if dist.get_rank() == 0:
                saved[kind].mkdir()
            dist.barrier()
            strategy = get_default_save_sharded_strategy("torch_dist", 1)
            dist_checkpointing.save(sharded_weights(chunks[0]), str(saved[kind]), strategy)
    return wrong


def tensors(chunk: Any) -> list[tuple[str, torch.Tensor]]:
    return [*chunk.named_parameters(), *((n, b) for n, b in chunk.named_buffers() if "expert_bias" in n)]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[list[str]]], dict[str, tuple[Path, Path]]]:
    root = tmp_path_factory.mktemp("layouts")
    folders = {}
    for kind in dict(SPLITS):
        folder = root / kind.replace(" ", "_")
        folders[kind] = write_checkpoint(folder / "hf", kind), folder / "megatron"
        to_megatron(*folders[kind])
    saved = {kind: folders[kind][0].parent / "saved" for kind in SAVED}
    return run_ranks(compare_loads, 2, folders, saved), folders


@pytest.mark.parametrize("case", range(len(SPLITS)), ids=lambda i: f"{SPLITS[i][0]} {SPLITS[i][1]}")
def test_megatron_cores_loader_fills_a_model_as_the_live_load_does(case: int, loads: Any) -> None:
    for rank in loads[0]:
        assert rank[case] == []


@pytest.mark.parametrize("kind", SAVED)
def test_what_two_ranks_saved_comes_back_bitwise(kind: str, loads: Any, tmp_path: Path) -> None:
    hf, _ = loads[1][kind]
    saved = hf.parent / "saved"
    to_hf(saved, tmp_path / "back", hf=hf)
    assert differences(load_file(tmp_path / "back" / "model.safetensors"), hf) == []
    assert verify(hf, saved).proven


def test_a_flipped_bit_of_what_two_ranks_saved_is_found(loads: Any, tmp_path: Path) -> None:
    hf, _ = loads[1]["qwen3 tied"]
    folder = Path(shutil.copytree(hf.parent / "saved", tmp_path / "saved"))
    weight = load_file(hf / "model.safetensors")["model.layers.3.mlp.gate_proj.weight"][:24].numpy().tobytes()
    [file] = [file for file in folder.glob("*.distcp") if weight in file.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.find(weight) + 50] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        WeightsError, match=rf"{file.name}: decoder\.layers\.mlp\.linear_fc1\.weight, bytes .*corrupted"
    ):
        to_hf(folder, tmp_path / "out", hf=hf)
