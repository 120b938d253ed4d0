"""Inner products of objectives' gradients over all parameters: one rank against a float64 model, every layout against
one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from invariance.cases import TEMPERATURE, Cell
from invariance.data import Reference, make_samples, model_config
from ranks import run_ranks

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.objectives import build_objective
from megatron_vespo.objectives.lab import angles
from megatron_vespo.policy.layout import ParallelLayout, local_indices
from megatron_vespo.samples.packing import pack, plan_micro_batches

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
MODEL = ModelConfig(path=Path("unused"), dtype="float32", layer_spec="local")
OBJECTIVES = ("vespo", "grpo", "gspo", "bapo", "reinforce")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense TP2": dict(tensor=2),
    "dense PP2, tied over the stages": dict(pipeline=2),
    "dense CP2": dict(context=2),
    "dense DP2": dict(),
    "moe TP2 EP2": dict(tensor=2, sequence=True, expert=2),
    "moe TP2, whole experts on both": dict(tensor=2, sequence=True),
    "moe TP2 ETP2": dict(tensor=2, sequence=True, expert_tensor=2),
    "moe PP2": dict(pipeline=2),
    "moe PP2 VPP2": dict(pipeline=2, virtual_pipeline=2),
    "moe CP2 EP2": dict(context=2, expert=2),
    "moe DP2 EP2": dict(expert=2),
    "moe DP2": dict(),
}


def products_of(layouts: dict[str, dict[str, Any]], samples: dict[str, Any]) -> dict[tuple[str, bool], torch.Tensor]:
    """(name of the layout, whether the optimizer is distributed) -> [K, K]."""
    from tiny_models import load, megatron_tensors, tiny_hf_model

    from megatron_vespo.policy import ranks
    from megatron_vespo.policy.gradients import gradient_products
    from megatron_vespo.policy.model import build_model
    from megatron_vespo.policy.optimizer import wrap_for_training
    from megatron_vespo.policy.step import LogprobHead

    platform.current().prepare_megatron(1)
    found = {}
    for name, sizes in layouts.items():
        config, batch = model_config(name.split()[0]), samples[name.split()[0]]
        layout = ParallelLayout(world_size=dist.get_world_size(), **sizes)
        ranks.initialize(layout, seed=1)
        plan = plan_micro_batches(
            [s.length for s in batch], data_parallel=layout.data, token_budget=48, multiple_of=layout.pipeline
        )[ranks.dp_rank()]
        align = int(np.lcm(layout.sequence_multiple, layout.row_multiple))
        batches = [pack([batch[i] for i in members], align=align) for members in plan]
        batches = [b.shard(local_indices(b.cu_seqlens, layout.context, ranks.cp_rank())) for b in batches]
        totals = {"total_tokens": float(sum(s.loss_mask.sum() for s in batch)), "total_sequences": float(len(batch))}
        objectives = [build_objective(objective) for objective in OBJECTIVES]
        weights = megatron_tensors(config, dict(tiny_hf_model(config, torch.float32).named_parameters()))
        for distributed in (False, True):
            models = build_model(config, MODEL, layout)
            load(models, weights)
            chunks = wrap_for_training(models, distributed_optimizer=distributed)
            head = LogprobHead(config.vocab_size, TEMPERATURE)
            found[name, distributed] = gradient_products(objectives, chunks, batches, head, totals)
        ranks.destroy()
    return found


@pytest.fixture(scope="module")
def samples() -> dict[str, Any]:
    return {kind: make_samples(kind) for kind in ("dense", "moe")}


@pytest.fixture(scope="module")
def one_rank(samples: dict[str, Any]) -> dict[str, torch.Tensor]:
    (found,) = run_ranks(products_of, 1, {"dense": {}, "moe": {}}, samples)
    assert all(torch.equal(found[kind, False], found[kind, True]) for kind in samples)
    return {kind: found[kind, False] for kind in samples}


@pytest.fixture(scope="module")
def two_ranks(samples: dict[str, Any]) -> list[dict[tuple[str, bool], torch.Tensor]]:
    return run_ranks(products_of, 2, LAYOUTS, samples)


def differences(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(largest relative difference of a norm, largest difference of a cosine)."""
    ours, theirs = angles(found), angles(expected)
    norms = torch.tensor(ours.norms) / torch.tensor(theirs.norms) - 1
    cosines = torch.tensor(ours.cosines) - torch.tensor(theirs.cosines)
    return float(norms.abs().max()), float(cosines.abs().max())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_one_rank_has_the_gradients_of_a_float64_model(one_rank: dict[str, torch.Tensor], kind: str) -> None:
    reference = Reference(kind)
    gradients = [reference.expected(Cell(objective, "token-mean")).gradients for objective in OBJECTIVES]
    expected = torch.tensor([[sum(float((a[n] * b[n]).sum()) for n in a) for b in gradients] for a in gradients])
    assert max(differences(one_rank[kind], expected.double())) < TOLERANCE
    # They do differ: a cosine that is 1 whatever is compared would show nothing.
    assert 0.2 < min(angles(expected).cosines[0]) < 0.97


@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_counts_each_parameter_once(
    one_rank: dict[str, torch.Tensor], two_ranks: Any, name: str, distributed: bool
) -> None:
    first, second = (rank[name, distributed] for rank in two_ranks)
    assert torch.equal(first, second)
    assert max(differences(first, one_rank[name.split()[0]])) < TOLERANCE
