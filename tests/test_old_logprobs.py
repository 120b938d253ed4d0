"""train.old_logprobs: which log-probs are old in each mode, and the pass that is not made for the engine's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import fake_run
from tiny_run import records

from megatron_vespo.config.load import ConfigError
from megatron_vespo.loop.modes import train
from megatron_vespo.loop.preflight_mode import check_resumed
from megatron_vespo.loop.run import Run
from megatron_vespo.policy.checkpoint_folder import read_state, step_folder

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "synchronous": {"train": {"mini_batches": 2}},
    "constant_lag": {"constant_lag": {"lag": 2}},
    "asynchronous": {"asynchronous": {"max_staleness": 2}},
}
ENGINE, TRAINER = -2.5, -1.0
"""Log-prob of every token: the fake engine's; the fake trainer's under its weights of now."""


def finished(folder: Path, mode: str, old_logprobs: str, **others: Any) -> Run:
    sections = MODES[mode] | others
    sections["train"] = {**sections.get("train", {}), "mode": mode, "old_logprobs": old_logprobs}
    run = fake_run(folder, **sections)
    run.engines.engine.logprob = ENGINE  # type: ignore[attr-defined]
    train(run)
    run.ledger.close()
    return run


def phases(run: Run) -> set[str]:
    """In which the trainer's time went."""
    steps = records(run.config.directory)
    return {phase for r in steps for phase in [*r["seconds"], *(phase for _, phase, _, _ in r["timeline"])]}


def old_of_trained(run: Run) -> list[np.ndarray]:
    return [s.old_logprobs for batch in run.trainers.trained for s in batch]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", MODES)
def test_the_engines_own_are_taken_without_a_pass(tmp_path: Path, mode: str) -> None:
    run = finished(tmp_path, mode, "engine")
    assert run.trainers.old_passes == [] and "old log-probs" not in phases(run) >= {"train"}  # type: ignore[attr-defined]
    old = old_of_trained(run)
    assert len(old) == 6 * 4 * 2 and all((values == ENGINE).all() for values in old)


@pytest.mark.parametrize("mode", MODES)
def test_the_trainers_own_are_computed_once_for_every_response(tmp_path: Path, mode: str) -> None:
    run = finished(tmp_path, mode, "exact")
    assert "old log-probs" in phases(run)
    old = old_of_trained(run)
    assert len(old) == 6 * 4 * 2 and not any((values == ENGINE).any() for values in old)
    if mode != "asynchronous":  # where each was sampled by the weights of the pass
        assert sum(count for _, count in run.trainers.old_passes) == len(old)  # type: ignore[attr-defined]
        assert all((values == TRAINER).all() for values in old)


@pytest.mark.parametrize(("before", "after"), [("engine", "engine"), ("engine", "exact"), ("exact", "engine")])
def test_batches_sampled_ahead_lack_nothing_that_a_continued_run_needs(tmp_path: Path, before: str, after: str) -> None:
    checkpoints = {"every": 3, "keep": 9}
    finished(tmp_path, "constant_lag", before, checkpoint=checkpoints)
    checkpoint = step_folder(tmp_path / "checkpoints", 3)
    if (before, after) == ("engine", "exact"):
        config = fake_run(tmp_path / "other", train={"mode": "constant_lag"}).config
        config = config.model_copy(update={"run_dir": tmp_path})
        with pytest.raises(ConfigError, match=r"train\.old_logprobs = exact: .*ahead/step_000003 .* set it to engine"):
            check_resumed(config, checkpoint)
    else:
        state = read_state(checkpoint)
        run = finished(tmp_path, "constant_lag", after, checkpoint=checkpoints, resumed=state)
        check_resumed(run.config, checkpoint)
        assert run.step == 6 and len(old_of_trained(run)) == 3 * 4 * 2
