"""Each objective's loss and gradients, through the real step: one rank against a float64 model and plain loops, and
every split against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.samples.packing import pack, plan_micro_batches
from megatron_vespo.samples.records import Prompt, Sample

TOLERANCE = 1e-5
ROUNDING = 3e-5
"""Of float32 against float64 on one rank: phi turns the rounding of a summed log-ratio into that of a coefficient."""
TEMPERATURE = 0.8
OBJECTIVES = ("vespo", "grpo", "gspo", "sapo", "cispo", "topr", "respo", "bapo", "m2po")
MODEL = ModelConfig(path=Path("unused"), dtype="float32", layer_spec="local")
SPLITS: dict[str, dict[str, Any]] = {
    "dense TP2": dict(tensor=2),
    "dense PP2": dict(pipeline=2),
    "dense CP2": dict(context=2),
    "dense DP2": dict(),
    "moe TP2": dict(tensor=2, sequence=True, expert=2),
    "moe PP2": dict(pipeline=2),
    "moe PP2 VPP2": dict(pipeline=2, virtual_pipeline=2),
    "moe CP2": dict(context=2, expert=2),
    "moe EP2": dict(expert=2),
    "moe DP2": dict(),
}


def make_samples(kind: str) -> list[Sample]:
    """Nine responses to two prompts, drawn off-policy: log W between about -1 and 1; some tokens masked."""
    from tiny_models import tiny_config, tiny_hf_model

    config = tiny_config(kind)
    model = tiny_hf_model(config)
    rng = np.random.default_rng(11)
    samples = []
    for i, length in enumerate((5, 17, 1, 30, 9, 12, 3, 22, 14)):
        prompt = Prompt(str(i % 2), rng.integers(1, 101, 4 + i % 2).astype(np.int32), "", "")
        response = rng.integers(1, 101, length).astype(np.int32)
        ids = torch.from_numpy(np.concatenate([prompt.tokens, response])).long()
        with torch.no_grad():
            table = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        now = table[len(prompt.tokens) - 1 : -1].gather(1, ids[len(prompt.tokens) :, None])[:, 0].numpy()
        old = now + rng.normal(0, 0.4 / np.sqrt(length), length)
        mask = rng.random(length) < 0.9
        mask[-1] = True
        samples.append(
            Sample(
                id=str(i),
                prompt=prompt,
                response_tokens=response,
                rollout_logprobs=(old + rng.normal(0, 0.2 / np.sqrt(length), length)).astype(np.float32),
                weight_versions=np.zeros(length, np.int32),
                loss_mask=mask,
                finish_reason="stop",
                advantage=float(rng.normal()),
                old_logprobs=old.astype(np.float32),
            )
        )
    return samples


def reference(kind: str, objective: str, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers and loops in float64."""
    from objective_data import Response
    from test_objective_reference import reference_loss
    from tiny_models import megatron_tensors, tiny_config, tiny_hf_model

    config = tiny_config(kind)
    model = tiny_hf_model(config)
    leaves, responses, start = [], [], 0
    for s in samples:
        ids = torch.from_numpy(np.concatenate([s.prompt.tokens, s.response_tokens])).long()
        table = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        first, length = len(s.prompt.tokens), len(s.response_tokens)
        leaves.append(table[first - 1 : -1].gather(1, ids[first:, None])[:, 0])
        responses.append(
            Response(
                positions=torch.arange(start, start + length),
                old=torch.from_numpy(s.old_logprobs).double(),
                rollout=torch.from_numpy(s.rollout_logprobs).double(),
                mask=torch.from_numpy(s.loss_mask),
                advantage=float(np.float32(s.advantage)),
            )
        )
        start += length
    loss = reference_loss(objective, "token-mean", "none", responses, torch.cat(leaves))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), megatron_tensors(config, gradients)


def errors_of_a_split(
    kind: str, split: dict[str, Any], samples: list[Sample], references: dict[str, Any]
) -> dict[str, Any]:
    """Objective -> (loss error on the last stage, worst gradient error relative to its tensor's largest, whose, and on
    one rank the loss and gradients themselves)."""
    from tiny_models import load, megatron_tensors, share_of, tiny_config, tiny_hf_model, whole_name

    from megatron_vespo.objectives import build_objective
    from megatron_vespo.policy import layout as ranks
    from megatron_vespo.policy.model import build_model
    from megatron_vespo.policy.optimizer import wrap_for_training
    from megatron_vespo.policy.step import LogprobHead, objective_loss, run_micro_batches, search_bounds, sum_metrics

    layout = ParallelLayout(world_size=dist.get_world_size(), **split)
    ranks.initialize(layout, seed=1)
    config = tiny_config(kind)
    models = build_model(config, MODEL, layout)
    load(models, megatron_tensors(config, dict(tiny_hf_model(config, torch.float32).named_parameters())))
    chunks = wrap_for_training(models, distributed_optimizer=False)
    plan = plan_micro_batches(
        [s.length for s in samples], data_parallel=layout.data, token_budget=48, multiple_of=layout.pipeline
    )[ranks.dp_rank()]
    align = int(np.lcm(layout.sequence_multiple, layout.row_multiple))
    batches = [pack([samples[i] for i in members], align=align) for members in plan]
    batches = [b.shard(ranks.local_indices(b.cu_seqlens, layout.context, ranks.cp_rank())) for b in batches]
    head = LogprobHead(config.vocab_size, TEMPERATURE)
    results: dict[str, Any] = {}
    for objective in OBJECTIVES:
        totals = {
            "total_tokens": float(sum(s.loss_mask.sum() for s in samples)),
            "total_sequences": float(len(samples)),
        }
        built = build_objective(objective)
        if built.needs_preparation:
            built = search_bounds(built, chunks, batches, head, totals)
        loss = objective_loss(built, totals)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        metrics = sum_metrics(run_micro_batches(chunks, batches, head, loss, forward_only=False))
        expected_loss, gradients = references[objective]
        worst, whose = 0.0, ""
        found: dict[str, torch.Tensor] = {}
        for model in models:
            for name, parameter in model.named_parameters():
                full = whole_name(model, name)
                found[full] = parameter.main_grad.clone()  # type: ignore[attr-defined]
                error = (found[full] - share_of(gradients[full], full, parameter)).abs().max()
                relative = float(error / gradients[full].abs().max())
                if not relative <= worst:
                    worst, whose = relative, full
        loss_error = abs(metrics["loss"][0] - expected_loss) / abs(expected_loss) if metrics else None
        results[objective] = (loss_error, worst, whose, (metrics["loss"][0], found) if layout.world_size == 1 else None)
    ranks.destroy()
    return results


def run_splits(splits: dict[str, Any], samples: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    platform.current().prepare_megatron(1)
    return {
        name: errors_of_a_split(name.split()[0], split, samples[name.split()[0]], references[name.split()[0]])
        for name, split in splits.items()
    }


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    samples = {kind: make_samples(kind) for kind in ("dense", "moe")}
    float64 = {kind: {name: reference(kind, name, samples[kind]) for name in OBJECTIVES} for kind in samples}
    one = run_ranks(run_splits, 1, {kind: {} for kind in samples}, samples, float64)
    one_rank = {kind: {name: one[0][kind][name][3] for name in OBJECTIVES} for kind in samples}
    two = run_ranks(run_splits, 2, SPLITS, samples, one_rank)
    return {kind: [one[0][kind]] for kind in samples} | {split: [rank[split] for rank in two] for split in SPLITS}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_one_rank_equals_the_float64_reference(results: Any, kind: str, objective: str) -> None:
    loss_error, gradient_error, whose, _ = results[kind][0][objective]
    assert loss_error < ROUNDING
    assert gradient_error < ROUNDING, whose


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_equals_one_rank(results: Any, split: str, objective: str) -> None:
    losses = [rank[objective][0] for rank in results[split] if rank[objective][0] is not None]
    assert losses and max(losses) < TOLERANCE
    for rank in results[split]:
        assert rank[objective][1] < TOLERANCE, rank[objective][2]
