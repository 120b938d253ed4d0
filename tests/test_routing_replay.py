"""Routing replay through the real step: under every split, log-probs and gradients are those of transformers (float64)
with its routers made to choose the same experts, which here are drawn at random, or recorded at other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from routing_reference import LENGTHS, Reference, make_config, make_model, make_samples, reference

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.layout import ParallelLayout, local_indices
from megatron_vespo.samples.packing import pack
from megatron_vespo.samples.records import Sample

TOLERANCE = 1e-5
ONE_RANK: dict[str, dict[str, Any]] = {
    "moe": dict(size=7),
    "moe one a micro-batch": dict(size=1),
    "moe recompute": dict(recompute="full"),
    "moe_unnormalised": dict(),
    "mixed": dict(),
    "glm4_moe": dict(),
}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "moe DP2": dict(size=3),
    "moe EP2": dict(expert=2),
    "moe CP2": dict(context=2),
    "moe CP2 EP2 recompute": dict(context=2, expert=2, recompute="full", size=3),
    "moe TP2": dict(tensor=2, sequence=True),
    "moe TP2 EP2 recompute": dict(tensor=2, sequence=True, expert=2, recompute="full", size=1),
    "moe TP2 ETP2": dict(tensor=2, sequence=True, expert_tensor=2),
    "moe PP2": dict(pipeline=2, size=1),
    "moe PP2 recompute": dict(pipeline=2, recompute="full", size=1),
    "moe PP2 VPP2": dict(pipeline=2, virtual_pipeline=2, size=1),
    "moe PP2 VPP2 recompute": dict(pipeline=2, virtual_pipeline=2, recompute="full", size=1),
    "mixed PP2": dict(pipeline=2),
    "mixed PP2 VPP2": dict(pipeline=2, virtual_pipeline=2),
    "moe_unnormalised TP2": dict(tensor=2, sequence=True),
    "deepseek_v3 TP2 EP2": dict(tensor=2, sequence=True, expert=2),
}


KINDS = ("moe", "moe_unnormalised", "mixed", "glm4_moe", "deepseek_v3")


def routed_as(samples: list[Sample], routing: list[np.ndarray]) -> list[Sample]:
    return [
        replace(s, routed_experts=experts[: s.length - 1].astype(np.uint8))
        for s, experts in zip(samples, routing, strict=True)
    ]


def make_references(kind: str) -> dict[str, Reference]:
    """r3: at random. live: nothing replayed. r2: weights moved after recording; free: the same without replay. both:
    every other sample has an engine's routing, the others' is what the routers chose before the weights moved."""
    samples = make_samples(kind)
    unrouted = [replace(s, routed_experts=None) for s in samples]
    live = reference(kind, unrouted)
    r2 = routed_as(samples, live.routing)
    both = [engine if i % 2 else recorded for i, (engine, recorded) in enumerate(zip(samples, r2, strict=True))]
    return {
        "r3": reference(kind, samples),
        "live": live,
        "r2": reference(kind, r2, perturbed=True),
        "free": reference(kind, unrouted, perturbed=True),
        "both": reference(kind, both, perturbed=True),
    }


class Rank:
    """One rank of one split."""

    def __init__(self, kind: str, split: dict[str, Any]) -> None:
        from megatron_vespo.policy import ranks
        from megatron_vespo.policy.model import build_model
        from megatron_vespo.policy.optimizer import wrap_for_training
        from megatron_vespo.policy.routing_replay import RoutingReplay

        split = dict(split)
        recompute, self.size = split.pop("recompute", "none"), split.pop("size", 2)
        self.kind, self.config = kind, make_config(kind)
        self.layout = ParallelLayout(world_size=dist.get_world_size(), **split)
        ranks.initialize(self.layout, seed=1)
        model = ModelConfig(path=Path(), dtype="float32", layer_spec="local", recompute=recompute)
        self.models = build_model(self.config, model, self.layout)
        self.replay = RoutingReplay("r3", self.models, self.config)
        self.chunks = wrap_for_training(self.models, distributed_optimizer=False)
        self.set_weights(perturbed=False)

    def set_weights(self, *, perturbed: bool) -> None:
        from tiny_models import held, load, megatron_tensors

        hf = make_model(self.kind, perturbed=perturbed, dtype=torch.float32)
        load(self.models, megatron_tensors(self.config, held(hf)))

    def run(
        self, samples: list[Sample], expected: Reference, *, update: bool, replayed: bool = True
    ) -> tuple[float, float, tuple[float, float] | None]:
        """Worst log-prob error, worst gradient error (relative to its tensor's largest), routing mismatch."""
        from megatron_vespo.objectives import build_objective
        from megatron_vespo.policy import ranks
        from megatron_vespo.policy.routing_replay import mismatch_metric
        from megatron_vespo.policy.step import LogprobHead, objective_loss, run_micro_batches

        # Where a packed row has the engine's log-probs, it has here what its own are to be.
        samples = [replace(s, rollout_logprobs=x) for s, x in zip(samples, expected.logprobs, strict=True)]
        mine = list(range(len(LENGTHS)))[ranks.dp_rank() :: self.layout.data]
        count = -(-len(LENGTHS) // self.layout.data) // self.size + 1
        count += count % 2  # as the interleaved schedule wants; the last may be empty
        plan = [[samples[i] for i in mine[self.size * n : self.size * (n + 1)]] for n in range(count)]
        align = int(np.lcm(self.layout.sequence_multiple, self.layout.row_multiple))
        whole = [pack(members, align=align) for members in plan]
        local = [local_indices(b.cu_seqlens, self.layout.context, ranks.cp_rank()) for b in whole]
        batches = [b.shard(rows) for b, rows in zip(whole, local, strict=True)]
        of_pass = self.replay.of_update if update else self.replay.of_old_pass
        routings = [of_pass(m, b.cu_seqlens, rows) for m, b, rows in zip(plan, whole, local, strict=True)]

        totals = dict(total_tokens=float(sum(s.loss_mask.sum() for s in samples)), total_sequences=float(len(samples)))
        reinforce, head = objective_loss(build_objective("reinforce"), totals), LogprobHead(self.config.vocab_size, 1.0)
        errors = [0.0]

        def loss(batch: Any, scores: torch.Tensor, **_: Any) -> Any:
            errors.append(float(((scores[0].detach() - batch.rollout_logprobs) * batch.mask).abs().max()))
            return reinforce(batch, scores) if update else scores

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        with torch.set_grad_enabled(update):
            chosen = routings if replayed else None
            run_micro_batches(self.chunks, batches, head, loss, forward_only=not update, routings=chosen)
        found = mismatch_metric("found", chosen).get("found")
        return max(errors), self.gradient_error(expected) if update else 0.0, found

    def gradient_error(self, expected: Reference) -> float:
        from tiny_models import share_of, whole_name

        worst = 0.0
        for model in self.models:
            for name, parameter in model.named_parameters():
                full = whole_name(model, name)
                share = share_of(expected.gradients[full], full, parameter)
                largest = float(expected.gradients[full].abs().max()) or 1.0  # an expert that no token goes to
                error = (parameter.main_grad - share).abs().max() / largest  # type: ignore[attr-defined]
                worst = float(torch.maximum(error, torch.tensor(worst)))
        return worst


def results_of_a_split(kind: str, split: dict[str, Any], expected: dict[str, Reference]) -> dict[str, Any]:
    from megatron_vespo.policy import ranks

    rank, samples = Rank(kind, split), make_samples(kind)
    unrouted = [replace(s, routed_experts=None) for s in samples]
    shifted = [replace(s, routed_experts=(s.routed_experts + 1) % 8) for s in samples]
    some = [s if i % 2 else replace(s, routed_experts=None) for i, s in enumerate(samples)]
    found = {
        "r3 old": rank.run(samples, expected["r3"], update=False),
        "r3 update": rank.run(samples, expected["r3"], update=True),
        "r3 shifted": rank.run(shifted, expected["r3"], update=False),
    }
    for mode, given in (("r2", unrouted), ("both", some)):
        rank.replay.mode = mode  # type: ignore[assignment]
        rank.set_weights(perturbed=False)
        old = expected["live"] if mode == "r2" else reference(kind, given)
        found[f"{mode} old"] = rank.run(given, old, update=False)
        rank.set_weights(perturbed=True)
        found[f"{mode} update"] = rank.run(given, expected[mode], update=True)
    rank.replay.mode = "r3"
    found["free"] = rank.run(samples, expected["free"], update=True, replayed=False)
    found["free held against r2"] = rank.run(samples, expected["r2"], update=True, replayed=False)
    ranks.destroy()
    return found


def run_splits(splits: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    platform.current().prepare_megatron(1)
    kinds = {name: name.split()[0] for name in splits}
    return {name: results_of_a_split(kinds[name], split, references[kinds[name]]) for name, split in splits.items()}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Reference]]:
    return {kind: make_references(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def results(references: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    one = run_ranks(run_splits, 1, ONE_RANK, references, timeout_s=240)
    two = run_ranks(run_splits, 2, TWO_RANKS, references, timeout_s=400)
    return {key: [rank[key] for rank in found] for found in (one, two) for key in found[0]}


SPLITS = [*ONE_RANK, *TWO_RANKS]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["r3", "r2", "both"])
def test_logprobs_and_gradients_are_those_of_the_replayed_routing(results: Any, split: str, mode: str) -> None:
    for rank in results[split]:
        assert rank[f"{mode} old"][0] < TOLERANCE
        logprob_error, gradient_error, _ = rank[f"{mode} update"]
        assert logprob_error < TOLERANCE and gradient_error < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_another_routing_is_seen(results: Any, split: str) -> None:
    last_stage = [rank for rank in results[split] if rank["r3 shifted"][0] > 0]
    assert last_stage
    for rank in last_stage:
        assert rank["r3 shifted"][0] > 0.05
        assert rank["free"][0] < TOLERANCE and rank["free held against r2"][0] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_mismatch_is_counted_once_over_all_ranks(results: Any, references: Any, split: str) -> None:
    expected = references[split.split()[0]]
    layers = expected["live"].routing[0].shape[1]
    tokens = sum(len(routing) for routing in expected["live"].routing)
    engine_pairs = float(layers * (tokens - len(LENGTHS)))  # the last token of each has no routing
    for rank in results[split]:
        assert rank["r3 old"][2] == rank["r3 update"][2] == (expected["r3"].elsewhere, engine_pairs)
        assert rank["r2 old"][2] is None
        elsewhere, pairs = rank["r2 update"][2]
        # The last tokens' recording is replayed too, and the reference does not count those.
        assert pairs == layers * tokens
        assert expected["r2"].elsewhere <= elsewhere <= expected["r2"].elsewhere + layers * len(LENGTHS)


@pytest.mark.slow
def test_the_reference_has_router_gradients_and_a_routing_that_moves(references: Any) -> None:
    for kind in ("moe", "mixed", "glm4_moe", "deepseek_v3"):
        for mode in ("r3", "r2"):
            routers = {n: g for n, g in references[kind][mode].gradients.items() if "router" in n}
            assert routers and all(float(g.abs().max()) > 1e-4 for g in routers.values())
        pairs = sum(routing[..., 0].size for routing in references[kind]["live"].routing)
        assert 0.1 < references[kind]["r2"].elsewhere / pairs < 0.9
