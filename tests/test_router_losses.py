"""Router losses through the real step: every split, order and padding gives the loss and gradients of plain loops over
transformers' router logits in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from router_reference import router_reference

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.layout import ParallelLayout, local_indices
from megatron_vespo.samples.packing import pack
from megatron_vespo.samples.records import Prompt, Sample

TOLERANCE = 1e-5
LOSSES = {"z": dict(router_z_loss=0.3), "balance": dict(router_balance_loss=2.0)}
"""Large: a router's gradient is mostly these."""
LENGTHS = (5, 17, 1, 30, 9, 12, 3)

ONE_RANK: dict[str, dict[str, Any]] = {
    "moe": dict(size=7),
    "moe one a micro-batch": dict(size=1, order=(3, 0, 6, 2, 5, 1, 4)),
    "moe padded": dict(size=3, order=(6, 5, 4, 3, 2, 1, 0), align=8),
    "moe recompute": dict(size=2, recompute="full"),
    "moe_unnormalised": dict(),
    "mixed": dict(),
    "mixtral": dict(),
    "deepseek_v3": dict(),
}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "moe DP2": dict(size=3),
    "moe DP2 distributed optimizer": dict(distributed_optimizer=True),
    "moe EP2": dict(expert=2),
    "moe CP2": dict(context=2),
    "moe CP2 EP2 recompute": dict(context=2, expert=2, recompute="full", size=3),
    "moe TP2": dict(tensor=2, sequence=True),
    "moe TP2 EP2": dict(tensor=2, sequence=True, expert=2, size=1),
    "moe TP2 ETP2": dict(tensor=2, sequence=True, expert_tensor=2, recompute="full"),
    "moe PP2": dict(pipeline=2),
    "moe PP2 recompute": dict(pipeline=2, recompute="full", size=1),
    "moe PP2 VPP2": dict(pipeline=2, virtual_pipeline=2, size=1),
    "mixed PP2": dict(pipeline=2),
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "moe TP2 PP2": dict(tensor=2, sequence=True, pipeline=2),
    "moe TP2 CP2": dict(tensor=2, sequence=True, context=2, expert=2),
}


def tiny(kind: str) -> Any:
    """``mixed``: the last two layers, a whole pipeline stage, are dense."""
    from tiny_models import tiny_config

    config = tiny_config("moe" if kind == "mixed" else kind)
    if kind == "mixed":
        config.mlp_only_layers = [2, 3]
    return config


def make_samples() -> list[Sample]:
    rng = np.random.default_rng(4)
    return [
        Sample(
            id=str(i),
            prompt=Prompt("", rng.integers(1, 101, 3 + i % 2).astype(np.int32), "", ""),
            response_tokens=rng.integers(1, 101, length).astype(np.int32),
            rollout_logprobs=np.zeros(length, np.float32),
            weight_versions=np.zeros(length, np.int32),
            loss_mask=np.arange(length) != 1,
            finish_reason="stop",
            advantage=float(np.float32(rng.normal())),
            old_logprobs=np.zeros(length, np.float32),
        )
        for i, length in enumerate(LENGTHS)
    ]


def reference(kind: str, losses: dict[str, float]) -> tuple[float, dict[str, torch.Tensor]]:
    """The value a layer, unweighted, and the gradients of REINFORCE plus the weighted loss."""
    from tiny_models import megatron_tensors, tiny_hf_model

    config = tiny(kind)
    model = tiny_hf_model(config)
    policy, router_logits, routing = torch.zeros((), dtype=torch.float64), [], []
    samples = make_samples()
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "route_tokens_to_experts")]
    for block in blocks:  # these models return no router_logits
        block.gate.register_forward_hook(lambda gate, inputs, logits: seen.append(logits))
    for s in samples:
        ids = torch.from_numpy(np.concatenate([s.prompt.tokens, s.response_tokens])).long()
        seen: list[torch.Tensor] = []
        output = model(ids[None], **{} if blocks else dict(output_router_logits=True))
        router_logits.append(seen if blocks else output.router_logits)
        routing.append([b.route_tokens_to_experts(x)[0] for b, x in zip(blocks, seen, strict=True)])
        logprobs = output.logits[0].log_softmax(-1)[len(s.prompt.tokens) - 1 : -1]
        taken = logprobs.gather(1, ids[len(s.prompt.tokens) :, None])[:, 0]
        policy = policy - s.advantage * taken[torch.from_numpy(s.loss_mask)].sum()
    z, balance = router_reference(router_logits, config.num_experts_per_tok, routing if blocks else None)
    ((name, weight),) = losses.items()
    value = {"router_z_loss": z, "router_balance_loss": balance}[name]
    (policy / sum(s.loss_mask.sum() for s in samples) + weight * value).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return value.item() / len(router_logits[0]), megatron_tensors(config, gradients)


def errors_of_a_split(
    kind: str, split: dict[str, Any], losses: dict[str, float], expected: tuple[float, dict[str, torch.Tensor]]
) -> tuple[float, float, str]:
    """On every rank: relative error of the metric, worst gradient error relative to its tensor's largest, and whose."""
    from tiny_models import gather_gradient_shards, held, load, megatron_tensors, share_of, tiny_hf_model, whole_name

    from megatron_vespo.objectives import build_objective
    from megatron_vespo.policy import ranks
    from megatron_vespo.policy.model import build_model
    from megatron_vespo.policy.optimizer import wrap_for_training
    from megatron_vespo.policy.router import RouterLosses
    from megatron_vespo.policy.step import LogprobHead, objective_loss, run_micro_batches

    split = dict(split)
    recompute, sharded = split.pop("recompute", "none"), split.pop("distributed_optimizer", False)
    size, order, align = split.pop("size", 2), split.pop("order", range(len(LENGTHS))), split.pop("align", 1)
    layout = ParallelLayout(world_size=dist.get_world_size(), **split)
    ranks.initialize(layout, seed=1)
    model_config = ModelConfig(path=Path(), dtype="float32", layer_spec="local", recompute=recompute, **losses)
    config, samples = tiny(kind), make_samples()
    models = build_model(config, model_config, layout)
    load(models, megatron_tensors(config, held(tiny_hf_model(config, torch.float32))))
    chunks = wrap_for_training(models, distributed_optimizer=sharded)

    mine = list(order)[ranks.dp_rank() :: layout.data]
    count = -(-len(LENGTHS) // layout.data) // size + 1
    count += count % 2  # as the interleaved schedule wants; the last may be empty
    plan = [mine[size * i : size * (i + 1)] for i in range(count)]
    align = int(np.lcm.reduce([align, layout.sequence_multiple, layout.row_multiple]))
    batches = [pack([samples[i] for i in members], align=align) for members in plan]
    batches = [b.shard(local_indices(b.cu_seqlens, layout.context, ranks.cp_rank())) for b in batches]
    totals = dict(total_tokens=float(sum(s.loss_mask.sum() for s in samples)), total_sequences=float(len(samples)))
    head, loss = LogprobHead(config.vocab_size, temperature=1.0), objective_loss(build_objective("reinforce"), totals)
    router_losses = RouterLosses.of_mini_batch(model_config, [s.length for s in samples])
    for chunk in chunks:
        chunk.zero_grad_buffer()
    run_micro_batches(chunks, batches, head, loss, forward_only=False, router_losses=router_losses)
    if sharded:
        gather_gradient_shards(chunks)

    value, gradients = expected
    worst, whose = 0.0, ""
    for model in models:
        for name, parameter in model.named_parameters():
            full = whole_name(model, name)
            error = (parameter.main_grad - share_of(gradients[full], full, parameter)).abs().max()  # type: ignore[attr-defined]
            relative = float(error) / (float(gradients[full].abs().max()) or 1.0)  # an expert that no token goes to
            if not relative <= worst:
                worst, whose = relative, full
    ((metric, (total, denominator)),) = router_losses.metrics().items()
    assert metric in losses
    ranks.destroy()
    return abs(total / denominator - value) / value, worst, whose


def forward_only(losses: dict[str, float]) -> tuple[set[type], list[float]]:
    """The classes of a model's routers, and the values of losses attached to them after a pass without a backward."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_vespo.policy import ranks
    from megatron_vespo.policy.model import build_model
    from megatron_vespo.policy.router import RouterLosses
    from megatron_vespo.policy.step import LogprobHead, run_micro_batches

    ranks.initialize(ParallelLayout(), seed=1)
    model_config = ModelConfig(path=Path(), dtype="float32", layer_spec="local", **losses)
    chunks = build_model(tiny("moe"), model_config, ParallelLayout())
    attached = RouterLosses(z=1.0, balance=1.0, total_tokens=1.0, total_sequences=1.0)
    attached.attach(chunks)
    head = LogprobHead(101, temperature=1.0)
    run_micro_batches(chunks, [pack(make_samples())], head, lambda *_, **options: None, forward_only=True)
    return {type(m) for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)}, attached.values.tolist()


def forward_only_cases() -> list[tuple[set[type], list[float]]]:
    platform.current().prepare_megatron(1)
    return [forward_only(losses) for losses in (LOSSES["balance"], {})]


def run_splits(splits: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    platform.current().prepare_megatron(1)
    return {
        (split, loss): errors_of_a_split(split.split()[0], settings, LOSSES[loss], references[split.split()[0], loss])
        for split, settings in splits.items()
        for loss in LOSSES
    }


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    kinds = {split.split()[0] for split in ONE_RANK}
    return {(kind, loss): reference(kind, LOSSES[loss]) for kind in kinds for loss in LOSSES}


@pytest.fixture(scope="module")
def results(references: dict[str, Any]) -> dict[str, Any]:
    one = run_ranks(run_splits, 1, ONE_RANK, references)
    two = run_ranks(run_splits, 2, TWO_RANKS, references, timeout_s=240)
    four = run_ranks(run_splits, 4, FOUR_RANKS, references, timeout_s=240)
    return {key: [rank[key] for rank in found] for found in (one, two, four) for key in found[0]}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", [*ONE_RANK, *TWO_RANKS, *FOUR_RANKS])
def test_metric_and_gradients_equal_the_reference(results: Any, split: str, loss: str) -> None:
    for metric_error, gradient_error, whose in results[split, loss]:
        assert metric_error < TOLERANCE
        assert gradient_error < TOLERANCE, whose


@pytest.mark.slow
def test_nothing_runs_without_weights_or_without_a_backward() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_vespo.policy.router import LossRouter

    nothing = [0.0, 0.0]
    assert run_ranks(forward_only_cases, 1) == [[({LossRouter}, nothing), ({TopKRouter}, nothing)]]


def samples_of(vocab_size: int) -> list[Sample]:
    samples = make_samples()
    for sample in samples:
        sample.prompt.tokens %= vocab_size
        sample.response_tokens %= vocab_size
    return samples


def train_mini_batch(config_file: Path) -> dict[str, tuple[float, float]]:
    from megatron_vespo.config.load import load_config
    from megatron_vespo.policy.trainer import PolicyTrainer

    platform.current().prepare_megatron(1)
    overrides = ["parallel.pipeline=2", "model.router_z_loss=0.001", "model.router_balance_loss=0.01"]
    trainer = PolicyTrainer(load_config(config_file, overrides).run)
    return trainer.train_mini_batch(samples_of(trainer.hf_config.vocab_size)).metrics


@pytest.mark.slow
def test_the_last_stage_reports_the_losses_of_all(tmp_path: Path) -> None:
    from tiny_run import make_run
    from transformers import AutoModelForCausalLM

    config_file = make_run(tmp_path)
    first, last = run_ranks(train_mini_batch, 2, config_file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    sequences = [[*s.prompt.tokens, *s.response_tokens] for s in samples_of(model.config.vocab_size)]
    with torch.no_grad():
        logits = [model(torch.tensor([s]), output_router_logits=True).router_logits for s in sequences]
    z, balance = router_reference(logits, model.config.num_experts_per_tok)
    assert first == {}
    assert last["router_z_loss"] == (pytest.approx(z.item(), rel=1e-5), 2.0)
    assert last["router_balance_loss"] == (pytest.approx(balance.item(), rel=1e-5), 2.0)
