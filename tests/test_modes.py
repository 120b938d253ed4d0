"""Synchronous, asynchronous and constant-lag runs on two Megatron ranks and an engine: equal where they must be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from modes_here import Finished, Modes, modes_here
from objective_formulas import vespo_phi

from megatron_vespo.samples.records import Sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Modes]:
    train = {"steps": 4, "mini_batches": 1, "prompts_per_step": 4}
    folder = tmp_path_factory.mktemp("modes")
    # The engine is to be slower than the trainer, on any machine: then each sync finds responses under way.
    sections = {"train": train, "evaluate": {"every": 2}, "rollout": {"engine_args": {"max-running-requests": 2}}}
    with pytest.MonkeyPatch.context() as patch, modes_here(folder, patch, **sections) as modes:
        yield modes


def assert_equal(ours: Finished, theirs: Finished) -> None:
    """Every number of every record, and every weight, to the bit."""
    assert len(ours.steps()) == 4 and ours.numbers() == theirs.numbers()
    mine, other = ours.weights(), theirs.weights()
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in other)


@pytest.fixture(scope="module")
def synchronous(modes: Modes) -> Finished:
    return modes.finished("synchronous")


def test_asynchronous_at_staleness_0_is_synchronous(modes: Modes, synchronous: Finished) -> None:
    ours = modes.finished("async_0", train={"mode": "asynchronous"}, asynchronous={"max_staleness": 0})
    assert_equal(ours, synchronous)
    assert all(record["staleness_max"] == 0 and record["grad_norm"] > 0 for record in ours.steps())


def test_constant_lag_0_is_synchronous(modes: Modes, synchronous: Finished) -> None:
    ours = modes.finished("lag_0", train={"mode": "constant_lag"}, constant_lag={"lag": 0})
    assert_equal(ours, synchronous)


def test_asynchronous_at_the_staleness_of_a_split_is_that_split(modes: Modes) -> None:
    """The second update's log pi_old is that of weights which the trainer has no more, and has kept."""
    theirs = modes.finished("split", train={"mini_batches": 2})
    settings = {"max_staleness": 1, "sync_every": 2}
    ours = modes.finished("async_split", train={"mini_batches": 2, "mode": "asynchronous"}, asynchronous=settings)
    assert_equal(ours, theirs)
    assert all(record["staleness_max"] == 1 for record in ours.steps())


def test_at_constant_lag_every_token_is_so_many_versions_old(modes: Modes) -> None:
    settings: dict[str, dict[str, Any]] = {
        "train": {"mode": "constant_lag", "steps": 5},
        "constant_lag": {"lag": 2},
        "checkpoint": {"every": 3, "keep": 9},
        "evaluate": {"every": 0},
    }
    ours = modes.finished("lag_2", **settings)
    for trained, samples in enumerate(ours.samples()):
        versions = np.concatenate([s.weight_versions for s in samples])
        assert {s.trained_version for s in samples} == {trained} and set(versions) == {max(0, trained - 2)}
    steps = ours.steps()
    assert [record["staleness_max"] for record in steps] == [0, 1, 2, 2, 2]
    # log pi_old is of the weights that sampled, so that the mismatch is the engine's alone.
    assert all(record["rollout_logprob_diff"] < 1e-5 for record in steps)
    assert steps[2]["k3_stale"] > 1e-4
    # What was sampled ahead is in the checkpoint, with the log pi_old of weights that are gone.
    resumed = modes.resumed(ours, "lag_2_resumed", 3, **settings)
    for mine, other in zip(resumed.numbers()[-3:], ours.numbers()[-3:], strict=True):
        # The probe is of the first responses that a process sees.
        assert not {name for name in mine if mine[name] != other[name] and not name.startswith("sync_probe")}
    assert all(torch.equal(value, ours.weights()[name]) for name, value in resumed.weights().items())


def test_ahead_of_training_responses_go_on_under_new_weights(modes: Modes) -> None:
    ours = modes.finished(
        "ahead",
        train={"mode": "asynchronous", "steps": 8},
        asynchronous={"max_staleness": 2},
        rollout={"max_response_tokens": 96},
    )
    samples = [sample for batch in ours.samples() for sample in batch]
    assert [record["step"] for record in ours.steps()] == list(range(1, 9))
    assert len({s.id for s in samples}) == len(samples) == 8 * 4 * 4
    lags = [s.trained_version - s.weight_versions for s in samples]
    assert max(lag.max() for lag in lags) == 2 and min(lag.min() for lag in lags) >= 0
    assert any(len(set(s.weight_versions)) > 1 for s in samples), "no response spans a sync"
    for record in ours.steps():
        # Token by token under the weights that sampled it, whichever the trainer has by now.
        assert record["rollout_logprob_diff"] < 1e-5 and record["mismatch/max"] < 1e-4
        assert record["rollouts/asked"] == record["rollouts/trained"] + record["rollouts/open"]
        assert record["queue/open_max"] <= 3 * 4
        assert sum(record["staleness_tokens"].values()) == sum(
            int(s.loss_mask.sum()) for s in samples if s.trained_version == record["step"] - 1
        )
    assert ours.steps()[-1]["rollouts/open"] == 0 and ours.steps()[-1]["k3_stale"] > 1e-5


def test_a_resumed_run_goes_on_behind_what_weights_that_are_left_had_sampled(modes: Modes) -> None:
    settings: dict[str, dict[str, Any]] = {
        "train": {"mode": "asynchronous", "steps": 6},
        "asynchronous": {"max_staleness": 2},
        "rollout": {"max_response_tokens": 96},
        "checkpoint": {"every": 3, "keep": 9},
        "evaluate": {"every": 0},
    }
    ours = modes.finished("going", **settings)
    theirs = modes.resumed(ours, "going_on", 3, **settings)
    before = {s.id: s for batch in ours.samples() for s in batch if s.trained_version >= 3}
    after = {s.id: s for batch in theirs.samples() for s in batch if s.trained_version >= 3}
    assert len(after) == 3 * 4 * 4 and theirs.steps()[-1]["rollouts/continued"] > 0
    beginnings = [(name, int((s.weight_versions <= 3).sum())) for name, s in before.items() if name in after]
    for name, count in beginnings:
        for field in ("response_tokens", "rollout_logprobs", "weight_versions"):
            assert np.array_equal(getattr(before[name], field)[:count], getattr(after[name], field)[:count])
    assert any(0 < count < len(before[name].response_tokens) for name, count in beginnings)
    for record in theirs.steps():
        # On two ranks, and half of it computed at the checkpoint.
        assert record["rollout_logprob_diff"] < 1e-5 and record["mismatch/max"] < 1e-4


def test_with_the_engines_own_logprobs_nothing_is_said_of_its_mismatch(modes: Modes) -> None:
    mode = {"mode": "asynchronous", "old_logprobs": "engine"}
    ours = modes.finished("engine", train=mode, asynchronous={"max_staleness": 1})
    for record in ours.steps():
        told = [name for name in record if "_stale" in name or "_engine" in name or name.startswith("mismatch/")]
        assert told == ["rollouts/dropped_stale"]
        assert "rollout_logprob_diff" not in record and record["w/mean"] > 0 and "health/ess_w" in record
    assert all(np.array_equal(s.old_logprobs, s.rollout_logprobs) for batch in ours.samples() for s in batch)


@pytest.mark.parametrize("mode", ["synchronous", "constant_lag"])
def test_the_engines_own_old_logprobs_save_the_pass_and_change_no_update(modes: Modes, mode: str) -> None:
    """At correction none log pi_old falls out of W, so that what is trained depends on the engine's alone."""
    sections: dict[str, dict[str, Any]] = {"train": {"mode": mode}, "constant_lag": {"lag": 2}}
    if mode == "synchronous":
        sections["train"]["mini_batches"] = 2
    theirs = modes.finished(f"{mode}_exact", **sections)
    sections["train"]["old_logprobs"] = "engine"
    ours = modes.finished(f"{mode}_engine", **sections)
    told = ("_stale", "_engine", "mismatch/", "rollout_logprob_diff")
    for mine, other in zip(ours.steps(), theirs.steps(), strict=True):
        assert "old log-probs" not in mine["seconds"] and mine["seconds"]["train"] > 0
        assert {name for name in other if name not in mine} == {n for n in other if any(part in n for part in told)}
        same = ("loss", "grad_norm", "reward", "log_w/std", "w/mean", "health/ess_phi", "staleness_mean")
        assert {n: mine[n] for n in same} == pytest.approx({n: other[n] for n in same}, rel=1e-3, abs=1e-5)
    assert any(record["log_w/std"] > 0.01 for record in ours.steps()), "nothing was off policy"
    for batch, record in zip(ours.samples(), ours.steps(), strict=True):
        assert record["loss"] == pytest.approx(loss_of(batch), rel=1e-5, abs=1e-7)
        assert all(np.array_equal(s.old_logprobs, s.rollout_logprobs) for s in batch)
    for name, value in theirs.weights().items():
        assert torch.allclose(ours.weights()[name], value, rtol=0, atol=1e-5), name


def loss_of(samples: list[Sample]) -> float:
    """VESPO's loss at token-mean in float64, old log-probs being the engine's: the mean over a step's updates."""
    updates: dict[int, list[Sample]] = {}
    for sample in samples:
        updates.setdefault(sample.trained_version, []).append(sample)
    losses = []
    for batch in updates.values():
        total = 0.0
        for s in batch:
            now, old = (x.astype(np.float64)[s.loss_mask] for x in (s.train_logprobs, s.rollout_logprobs))
            total -= vespo_phi(math.exp((now - old).sum()), s.advantage) * s.advantage * now.sum()
        losses.append(total / sum(s.loss_mask.sum() for s in batch))
    return float(np.mean(losses))
