"""The simulated loops beside the real ones: real loops, pool and grader over engines and a trainer that only take their
time, so that the rates are known and a busy machine counts for little."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_run import PROMPTS, fake_run

from megatron_vespo.loop.modes import train
from megatron_vespo.loop.run import Run
from megatron_vespo.plan.calibrate import WARMUP_STEPS, drained_steps, measured_outcome, measured_steps
from megatron_vespo.plan.loops import simulate
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.setup import plant_of, schedule_of
from megatron_vespo.plan.workload import GroupShape
from megatron_vespo.rollout import GenerateRequest, Generation
from megatron_vespo.samples.stream import PromptStream

pytestmark = pytest.mark.slow

STEP_S, UPDATE_S, SYNC_S = 0.03, 0.25, 0.12
STEPS = 13
PHASES = ("old log-probs", "train", "sync")
LENGTHS = np.random.default_rng(3).choice([3, 5, 8, 14, 30], PROMPTS, p=[0.3, 0.3, 0.2, 0.15, 0.05]).tolist()


@dataclass
class InOrder:
    """The run's prompts, in the order in which it draws them."""

    stream: PromptStream

    def draw(self, rng: np.random.Generator, size: int, longest: int) -> GroupShape:
        (prompt,) = self.stream.next(1)
        return GroupShape(1, np.full(size, min(LENGTHS[int(prompt.tokens[0])], longest), np.int64))


def timed(run: Run) -> list[tuple[float, int, int]]:
    """Syncs take time, in which the engines stand still. Of each group sampled: seconds, tokens of a response, and
    syncs that came in between."""
    engine, publish, sampled = run.engines.engine, run.engine_weights.publish, []  # type: ignore[attr-defined]
    sample = engine._sampled

    def slow_sync(version: int) -> Any:
        engine.pause()
        time.sleep(SYNC_S)
        engine.resume()
        return publish(version)

    async def timed_sample(request: GenerateRequest) -> list[Generation]:
        start = time.monotonic()
        found = await sample(request)
        versions = found[0].weight_versions
        if len(versions):
            sampled.append((time.monotonic() - start, len(versions), len(set(versions.tolist())) - 1))
        return found

    run.engine_weights.publish = slow_sync  # type: ignore[method-assign]
    engine._sampled = timed_sample
    return sampled


def both(folder: Path, **sections: dict[str, Any]) -> tuple[Outcome, Outcome]:
    """(measured, predicted), without the first steps, and without the last, for which nothing more is asked. Predicted
    from what a decode step, an update, a sync and the driver really took: on a busy machine more than they were to."""
    sections["train"] = {"steps": STEPS, **sections["train"]}
    run = fake_run(folder, lengths=LENGTHS, step_s=STEP_S, update_s=UPDATE_S, **sections)
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    workload = InOrder(PromptStream(run.prompts.prompts, run.config.seed))
    sampled = timed(run)
    train(run)

    steps, updates = measured_steps(folder), run.config.train.mini_batches
    took = {phase: sum(step.seconds.get(phase, 0.0) for step in steps) for phase in (*PHASES, "driver")}
    sync = took["sync"] * run.config.asynchronous.sync_every / (len(steps) * updates)
    if run.config.train.mode == "synchronous":
        sync = took["sync"] / len(steps)
    predicted = simulate(
        plant_of(run.config),
        schedule_of(run.config),
        Rates(
            decode_step=sum(s - sync * syncs for s, _, syncs in sampled) / sum(tokens for _, tokens, _ in sampled),
            decode_response=0,
            train_token=0,
            old_logprobs_pass=took["old log-probs"] / (len(steps) * updates),
            update=took["train"] / (len(steps) * updates),
            sync=sync,
            step=took["driver"] / len(steps),
        ),
        workload,
        updates=(STEPS - WARMUP_STEPS - drained_steps(run.config)) * updates,
        warmup=WARMUP_STEPS * updates,
    )
    return measured_outcome(folder), predicted


CASES: dict[str, dict[str, Any]] = {
    "synchronous": {"train": {"mode": "synchronous", "mini_batches": 2}},
    "wait": {"train": {"mode": "asynchronous"}, "asynchronous": {"max_staleness": 2}},
    "drop": {
        "train": {"mode": "asynchronous", "mini_batches": 2},
        "asynchronous": {"sync_every": 2, "max_staleness": 2, "too_stale": "drop"},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_simulator_tells_what_the_real_loop_does(tmp_path: Path, name: str) -> None:
    measured, predicted = both(tmp_path, **CASES[name])
    assert predicted.samples_per_s == pytest.approx(measured.samples_per_s, rel=0.1)
    assert predicted.trainer_idle == pytest.approx(measured.trainer_idle, abs=0.1)
    assert predicted.engine_idle == pytest.approx(measured.engine_idle, abs=0.1)
    assert predicted.staleness_max == measured.staleness_max
    assert predicted.staleness_mean == pytest.approx(measured.staleness_mean, abs=0.15)
    assert predicted.dropped == pytest.approx(measured.dropped, abs=0.06)
    if name == "synchronous":  # where nothing depends on the time
        assert predicted.staleness.tolist() == measured.staleness.tolist()
    share = measured.staleness / measured.staleness.sum()
    theirs = predicted.staleness / predicted.staleness.sum()
    assert np.abs(share - theirs).sum() / 2 < 0.12
