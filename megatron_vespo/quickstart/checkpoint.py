"""The quickstart's model folder: a small Qwen3-MoE checkpoint in HF format with its tokenizer, and its problems."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_vespo.quickstart.problems import (
    make_demonstrations,
    make_problems,
    write_demonstrations,
    write_problems,
)
from megatron_vespo.quickstart.tokenizer import render_example, train_tokenizer
from megatron_vespo.quickstart.warmup import STEPS, warm_up

MARKER = "quickstart.json"
"""Written last; says that the folder is complete, and from which seed."""
TRAIN_PROBLEMS = 4096
HELDOUT_PROBLEMS = 256
PROBE_PROBLEMS = 256
DEMONSTRATIONS_PER_PROBLEM = 4


def model_config(vocab_size: int, *, eos_token_id: int, pad_token_id: int) -> Qwen3MoeConfig:
    """Everything a large Qwen3-MoE has (grouped-query attention, q/k norms, untied head), small."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=64,
        intermediate_size=128,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.0,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        # Larger than the 0.02 that suits a hidden size of thousands.
        initializer_range=0.05,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def make_quickstart(folder: Path, seed: int, warmup_steps: int = STEPS) -> None:
    """Write config, weights, tokenizer, train.jsonl, heldout.jsonl and demonstrations.jsonl into ``folder``.

    A complete folder of the same seed is left as it is. The folder appears at once, under its name, when all is in it.

    Raises:
        FileExistsError: ``folder`` holds something else.
    """
    if _is_complete(folder, seed):
        return
    building = folder.with_name(f".{folder.name}.building-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)  # a killed run's, whose process number has come round again
    building.mkdir(parents=True)
    try:
        _build(building, seed, warmup_steps)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_complete(folder: Path, seed: int) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = folder / MARKER
    if not marker.is_file():
        raise FileExistsError(f"{folder} exists and is not a quickstart model (no {MARKER}); name another folder")
    found = json.loads(marker.read_text())["seed"]
    if found != seed:
        raise FileExistsError(f"{folder} holds the quickstart of seed {found}, not {seed}: remove it or name another")
    return True


def _build(folder: Path, seed: int, warmup_steps: int) -> None:
    train = make_problems("train", TRAIN_PROBLEMS, seed)
    demonstrations = make_demonstrations(train, seed, rounds=DEMONSTRATIONS_PER_PROBLEM)
    write_problems(folder / "train.jsonl", train)
    write_problems(folder / "heldout.jsonl", make_problems("heldout", HELDOUT_PROBLEMS, seed))
    write_demonstrations(folder / "demonstrations.jsonl", demonstrations)

    tokenizer = train_tokenizer(render_example(d.problem.text, d.response) for d in demonstrations)
    torch.manual_seed(seed)
    config = model_config(len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen3MoeForCausalLM(config)
    probe = make_problems("probe", PROBE_PROBLEMS, seed)
    report = warm_up(model, tokenizer, demonstrations, probe, seed, warmup_steps)

    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    marker = {"seed": seed, "parameters": parameters, "warm_up": report.as_dict()}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
