"""Every way of splitting the model gives the loss and every gradient of one rank; one rank gives transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.layout import ParallelLayout, local_indices

TOLERANCE = 1e-5
MODEL = ModelConfig(path=Path("unused"), dtype="float32", layer_spec="local")
ROWS = ([12, 4, 28], [40], [8, 8, 4, 4, 16, 20], [24, 12])
"""Sequence lengths of each micro-batch: multiples of 4, as two context-parallel ranks need."""

SPLITS: dict[str, dict[str, Any]] = {
    "dense TP2": dict(tensor=2),
    "dense TP2 SP": dict(tensor=2, sequence=True),
    "dense TP2 SP plain log-probs": dict(tensor=2, sequence=True, logprobs="plain"),
    "dense PP2": dict(pipeline=2),
    "dense PP2 VPP2": dict(pipeline=2, virtual_pipeline=2),
    "dense CP2": dict(context=2),
    "dense DP2": dict(),
    "dense DP2 distributed optimizer": dict(distributed_optimizer=True),
    "dense PP2 recompute": dict(pipeline=2, recompute="full"),
    "moe TP2 SP": dict(tensor=2, sequence=True),
    "moe TP2 SP EP2": dict(tensor=2, sequence=True, expert=2),
    "moe TP2 SP ETP2": dict(tensor=2, sequence=True, expert_tensor=2),
    "moe PP2": dict(pipeline=2),
    "moe PP2 VPP2": dict(pipeline=2, virtual_pipeline=2),
    "moe CP2": dict(context=2),
    "moe CP2 EP2": dict(context=2, expert=2),
    "moe EP2": dict(expert=2),
    "moe EP2 distributed optimizer": dict(expert=2, distributed_optimizer=True),
    "moe DP2": dict(),
    "deepseek_v3 TP2 SP": dict(tensor=2, sequence=True),
    "deepseek_v3 TP2 SP EP2": dict(tensor=2, sequence=True, expert=2),
    "deepseek_v3 PP2": dict(pipeline=2),
    "deepseek_v3 CP2": dict(context=2),
    "deepseek_v3 CP2 EP2 recompute": dict(context=2, expert=2, recompute="full"),
    "glm4_moe TP2 SP": dict(tensor=2, sequence=True),
    "glm4_moe CP2 EP2": dict(context=2, expert=2),
}
KINDS = ("dense", "moe", "moe_unnormalised", "qwen2", "llama", "llama3", "deepseek_v3", "glm4_moe")


@dataclass
class MicroBatch:
    """One packed row, whole: [T] each, and cu_seqlens [sequences + 1]."""

    tokens: torch.Tensor
    targets: torch.Tensor
    coefficients: torch.Tensor
    cu_seqlens: torch.Tensor


def micro_batches(vocab_size: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for lengths in ROWS:
        total = sum(lengths)
        tokens, targets = (torch.randint(vocab_size, (total,), generator=generator) for _ in range(2))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        rows.append(MicroBatch(tokens, targets, torch.randn(total, generator=generator), cu_seqlens))
    return rows


def reference(kind: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """transformers, float64, one sequence at a time: log-probs of the targets [T] a micro-batch, and the gradient of
    their sum weighted by the coefficients."""
    from tiny_models import megatron_tensors, tiny_config, tiny_hf_model

    config = tiny_config(kind)
    model = tiny_hf_model(config)
    logprobs = []
    for row in micro_batches(config.vocab_size):
        parts = []
        for start, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            logits = model(row.tokens[None, start:end]).logits[0]
            parts.append(logits.log_softmax(-1).gather(1, row.targets[start:end, None])[:, 0])
        logprobs.append(torch.cat(parts))
        (logprobs[-1] * row.coefficients).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in logprobs], megatron_tensors(config, gradients)


def errors_of_a_split(
    kind: str,
    split: dict[str, Any],
    logprobs: list[torch.Tensor],
    gradients: dict[str, torch.Tensor],
) -> tuple[float, float, str, set[str]]:
    """On every rank: worst log-prob error, worst gradient error (relative to the tensor's largest value), whose that
    is, and the names this rank compared."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from tiny_models import (
        gather_gradient_shards,
        held,
        load,
        megatron_tensors,
        share_of,
        tiny_config,
        tiny_hf_model,
        whole_name,
    )

    from megatron_vespo.policy import ranks
    from megatron_vespo.policy.attention import packed_seq_params
    from megatron_vespo.policy.model import build_model
    from megatron_vespo.policy.step import LogprobHead

    split = dict(split)
    sharded = split.pop("distributed_optimizer", False)
    path = split.pop("logprobs", "fused")
    model_config = MODEL.model_copy(update={"recompute": split.pop("recompute", "none")})
    layout = ParallelLayout(world_size=dist.get_world_size(), **split)
    ranks.initialize(layout, seed=1)
    config = tiny_config(kind)
    chunks = build_model(config, model_config, layout)
    whole = megatron_tensors(config, held(tiny_hf_model(config, torch.float32)))
    load(chunks, whole)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads

    rows = list(enumerate(micro_batches(config.vocab_size)))[ranks.dp_rank() :: layout.data]
    logprob_errors = [0.0]

    def forward_step(rows_left: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[torch.Tensor, Any]:
        number, row = next(rows_left)
        local = local_indices(row.cu_seqlens, layout.context, ranks.cp_rank())
        head = LogprobHead(config.vocab_size, temperature=1.0, path=path).of(row.targets[local])
        packing = packed_seq_params(row.cu_seqlens)
        output = model(row.tokens[None, local], None, None, packed_seq_params=packing, head=head)

        def loss(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            logprob = scores[0]
            logprob_errors.append(float((logprob.detach() - logprobs[number][local]).abs().max()))
            return (logprob * row.coefficients[local]).sum(), torch.zeros((), dtype=torch.int), {}

        return output, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(rows) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(rows),
        seq_length=1,  # rows differ in length: each send says its own
        micro_batch_size=1,
        forward_only=False,
    )
    if sharded:
        gather_gradient_shards(wrapped)
    worst, whose, names = 0.0, "", set()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            full_name = whole_name(chunk, name)
            names.add(full_name)
            expected = share_of(gradients[full_name], full_name, parameter)
            scale = float(gradients[full_name].abs().max()) or 1.0  # an expert that no token goes to
            error = float((parameter.main_grad - expected).abs().max()) / scale  # type: ignore[attr-defined]
            if not error <= worst:
                worst, whose = error, full_name
        for name, bias in chunk.named_buffers():
            if name.endswith("expert_bias"):
                assert torch.equal(bias, whole[whole_name(chunk, name)]), "an update moved an expert bias"
    ranks.destroy()
    return max(logprob_errors), worst, whose, names


def run_splits(splits: dict[str, dict[str, Any]], references: dict[str, Any]) -> dict[str, Any]:
    platform.current().prepare_megatron(1)
    results = {}
    for name, split in splits.items():
        kind = name.split()[0]
        try:
            results[name] = errors_of_a_split(kind, split, *references[kind])
        except BaseException as error:
            error.add_note(f"in the split {name!r}")
            raise
    return results


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {kind: reference(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def one_rank(references: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(run_splits, 1, {kind: {} for kind in references}, references, timeout_s=240)[0]


@pytest.fixture(scope="module")
def two_ranks(references: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(run_splits, 2, SPLITS, references, timeout_s=240)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_transformers(kind: str, one_rank: dict[str, Any], references: dict[str, Any]) -> None:
    logprob_error, gradient_error, whose, names = one_rank[kind]
    assert logprob_error < TOLERANCE
    assert gradient_error < TOLERANCE, whose
    assert names == set(references[kind][1])


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_a_split_equals_one_rank(split: str, two_ranks: list[dict[str, Any]], references: dict[str, Any]) -> None:
    """Both are held against transformers in float64, on each rank, so that replicas that disagree are seen."""
    for ranks_result in two_ranks:
        logprob_error, gradient_error, whose, _ = ranks_result[split]
        assert logprob_error < TOLERANCE
        assert gradient_error < TOLERANCE, whose
    assert set.union(*(r[split][3] for r in two_ranks)) == set(references[split.split()[0]][1])
