"""train.old_logprobs: which log-probs are old in each mode, and the pass that is not made for the engine's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import fake_run
from tiny_run import records

from megatron_vespo.loop.modes import train
from megatron_vespo.loop.run import Run

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "synchronous": {"train": {"mini_batches": 2}},
    "constant_lag": {"constant_lag": {"lag": 2}},
    "asynchronous": {"asynchronous": {"max_staleness": 2}},
}
ENGINE, TRAINER = -2.5, -1.0
"""Log-prob of every token: the fake engine's; the fake trainer's under its weights of now."""


def finished(folder: Path, mode: str, old_logprobs: str) -> Run:
    sections = dict(MODES[mode])
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
