"""Routing from the engine to the trainer: with R3 in float32 the trainer's log-probs are the engine's own, whatever the
layout, and with any other routing they are not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from tiny_run import make_checkpoint, make_run

from megatron_vespo.config.load import load_config
from megatron_vespo.rollout import GenerateRequest, SamplingParams, launch_engine
from megatron_vespo.samples.records import Prompt, RoutingShape, Sample

pytestmark = pytest.mark.slow
TOLERANCE = 2e-5
TEMPERATURE = 0.7
SGLANG_MISSING = importlib.util.find_spec("sglang") is None
LAYOUTS = {
    "TP2 EP2": ["parallel.tensor=2"],
    "TP2 ETP2": ["parallel.tensor=2", "parallel.expert_tensor=2", "parallel.expert=1"],
    "PP2": ["parallel.pipeline=2"],
    "PP2 VPP2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "CP2": ["parallel.context=2", "parallel.expert=1"],
    "DP2 EP2": ["parallel.expert=2"],
}


def sample(kind: str, folder: Path, logs: Path) -> list[Sample]:
    shape = RoutingShape(layers=4, moe_layers=(0, 1, 2, 3), topk=2, experts=8)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 40, size).astype(np.int32) for size in (1, 9, 4, 20)]
    requests = [
        GenerateRequest(str(i), prompt, SamplingParams(12 + 9 * i, TEMPERATURE), n=2, routing=shape)
        for i, prompt in enumerate(prompts)
    ]
    with launch_engine(kind, folder, log_file=logs / "log", precision="fp32", routed_experts=True) as engine:  # type: ignore[arg-type]
        groups = engine.generate(requests)
    return [
        Sample(
            id=f"{request.id}/{i}",
            prompt=Prompt(request.id, request.prompt_tokens, "", ""),
            response_tokens=got.tokens,
            rollout_logprobs=got.logprobs,
            weight_versions=got.weight_versions,
            loss_mask=np.ones(len(got.tokens), bool),
            finish_reason=got.finish_reason,
            advantage=float(rng.normal()),
            routed_experts=got.routed_experts,
        )
        for request, group in zip(requests, groups, strict=True)
        for i, got in enumerate(group)
    ]


def passes(config_file: Path, samples: list[Sample]) -> dict[str, dict[str, Any]]:
    from megatron_vespo import platform
    from megatron_vespo.policy.trainer import PolicyTrainer

    platform.current().prepare_megatron(1)
    found: dict[str, dict[str, Any]] = {}
    for name, overrides in LAYOUTS.items():
        overrides = [*overrides, "model.routing_replay=r3", f"rollout.temperature={TEMPERATURE}"]
        trainer = PolicyTrainer(load_config(config_file, overrides).run)
        elsewhere = [replace(s, routed_experts=(s.routed_experts + 1) % 8) for s in samples]
        replayed, metrics = trainer.compute_old_logprobs(samples)
        shifted, shifted_metrics = trainer.compute_old_logprobs(elsewhere)
        update = trainer.train_mini_batch([replace(s, old_logprobs=s.rollout_logprobs) for s in samples])
        found[name] = {
            "replayed": replayed,
            "shifted": shifted,
            "update": update.logprobs,
            "after": trainer.compute_old_logprobs(samples)[0],
            "metrics": (metrics, shifted_metrics, update.metrics),
        }
    return found


@pytest.fixture(
    scope="module",
    params=[
        "reference",
        pytest.param(
            "sglang",
            marks=[pytest.mark.sglang, pytest.mark.skipif(SGLANG_MISSING, reason="SGLang is missing: `make sglang`")],
        ),
    ],
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], list[Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    config = make_run(folder)
    samples = sample(request.param, make_checkpoint(folder / "model", num_hidden_layers=4), folder)
    return samples, run_ranks(passes, 2, config, samples, timeout_s=300)


def worst(samples: list[Sample], ranks: list[Any], layout: str, which: str) -> float:
    parts = [rank[layout][which] for rank in ranks]
    reported = {position: values for part in parts for position, values in part.items()}
    assert sorted(reported) == list(range(len(samples)))
    return max(float(np.abs(reported[i] - s.rollout_logprobs).max()) for i, s in enumerate(samples))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_r3_the_trainers_logprobs_are_the_engines(found: Any, layout: str) -> None:
    samples, ranks = found
    assert worst(samples, ranks, layout, "replayed") < TOLERANCE
    assert worst(samples, ranks, layout, "update") < TOLERANCE
    assert worst(samples, ranks, layout, "shifted") > 0.1
    assert worst(samples, ranks, layout, "after") > 100 * TOLERANCE  # the update moved something


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mismatch_of_engine_and_trainer_is_a_metric(found: Any, layout: str) -> None:
    samples, ranks = found
    pairs = float(4 * sum(s.length - 1 for s in samples))
    updates = []
    for rank in ranks:
        replayed, shifted, update = rank[layout]["metrics"]
        assert replayed == {"routing_mismatch_engine": (0.0, pairs)}
        elsewhere, of = shifted["routing_mismatch_engine"]
        assert of == pairs and elsewhere > 0.9 * pairs
        updates += [update] if update else []  # of the last pipeline stage
    assert updates and all(metrics["routing_mismatch_update"] == (0.0, pairs) for metrics in updates)


# --- what cannot be replayed -------------------------------------------------------------------------------------


def refusals(config_file: Path) -> dict[str, str]:
    from test_trainer import make_samples

    from megatron_vespo import platform
    from megatron_vespo.policy.trainer import PolicyTrainer

    platform.current().prepare_megatron(1)
    found = {}
    for mode in ("r2", "r3"):
        trainer = PolicyTrainer(load_config(config_file, [f"model.routing_replay={mode}"]).run)
        samples = make_samples(3, trainer.hf_config.vocab_size)
        routed = [replace(s, routed_experts=np.zeros((s.length - 1, 2, 2), np.uint8)) for s in samples]
        short = [replace(s, routed_experts=s.routed_experts[1:]) for s in routed]
        calls = {
            "r2": {"unrecorded": (trainer.train_mini_batch, samples)},
            "r3": {
                "missing": (trainer.compute_old_logprobs, samples),
                "short": (trainer.compute_old_logprobs, short),
                "twice": (trainer.compute_old_logprobs, routed),
            },
        }[mode]
        for name, (method, given) in calls.items():
            with pytest.raises(ValueError) as refused:
                method(given)
            found[name] = str(refused.value)
    return found


def test_a_routing_that_is_missing_or_not_whole_is_refused(tmp_path: Path) -> None:
    (found,) = run_ranks(refusals, 1, make_run(tmp_path, cluster={"ranks_per_node": 1}))
    assert "no routing was recorded" in found["unrecorded"] and "compute_old_logprobs" in found["unrecorded"]
    assert "has no routed_experts" in found["missing"]
    assert "expected (" in found["short"]
    assert "to one expert twice" in found["twice"]
