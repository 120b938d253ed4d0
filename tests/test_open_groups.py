"""What a restart takes up of groups that an earlier process had open."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_run import fake_run

from megatron_vespo.loop.open_groups import Group, keep, take_up
from megatron_vespo.loop.run import Run
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.staleness import oldest_version

FIRST = 3
"""The version of the checkpoint."""


def sampled(run: Run, number: int, *versions: list[int], reason: str = "stop") -> list[Sample]:
    """The responses to prompt ``number``, whose tokens were sampled by these versions."""
    prompt = run.prompts.prompts[number]
    return [
        Sample(
            id=f"{number // 4}/train/{prompt.id}/{i}",
            prompt=prompt,
            response_tokens=np.arange(len(of_one), dtype=np.int32),
            rollout_logprobs=np.zeros(len(of_one), np.float32),
            weight_versions=np.array(of_one, np.int32),
            loss_mask=np.ones(len(of_one), bool),
            finish_reason=reason,  # type: ignore[arg-type]
        )
        for i, of_one in enumerate(versions)
    ]


def restarted(
    folder: Path, whole: dict[int, list[list[int]]], begun: dict[int, list[list[int]]], **options: Any
) -> Run:
    """After a process that left these on disk, by the prompt's number."""
    run = fake_run(folder, **options)
    for number in (*whole, *begun):
        run.ledger.ask(f"{number // 4}/train", [run.prompts.prompts[number]], 2, number // 4)
    run.ledger.generated([s for number, versions in whole.items() for s in sampled(run, number, *versions)])
    run.ledger.generating([s for n, versions in begun.items() for s in sampled(run, n, *versions, reason="abort")])
    run.ledger.close()
    state = {"step": FIRST, "version": FIRST, "prompts": run.prompts.state()}
    return fake_run(folder, resumed=state, **options)


def taken_up(run: Run, *numbers: int) -> list[Group]:
    groups = [Group(number, run.prompts.prompts[number]) for number in numbers]
    take_up(run, groups, FIRST)
    return groups


def reasons(folder: Path) -> set[str]:
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        return {row[0] for row in db.execute("SELECT reason FROM samples WHERE reason IS NOT NULL")}


def test_whole_ones_are_whole_cut_ones_begin_and_lost_ones_are_asked_anew(tmp_path: Path) -> None:
    whole = {0: [[3, 3], [3]], 1: [[3, 3, 4], [3]], 2: [[3], [4, 4]], 4: [[4], [4]]}
    run = restarted(tmp_path, whole, {5: [[3, 3]], 6: [[4]]})
    groups = taken_up(run, 0, 1, 2, 4, 5, 6, 7)
    assert [group.samples is not None for group in groups] == [True] + [False] * 6
    begun = [[(s.finish_reason, len(s.response_tokens)) for s in group.begun] for group in groups]
    assert begun == [[], [("abort", 2), ("stop", 1)], [("stop", 1), ("abort", 0)], [], [("abort", 2)], [], []]
    assert reasons(tmp_path) == {"weights that sampled it are gone"}
    # What was asked anew, and what goes on, may come to its end.
    for number in (1, 2, 4, 5, 6, 7):
        run.ledger.generated(sampled(run, number, [3], [3]))


@pytest.mark.parametrize(("too_stale", "goes_on"), [("drop", False), ("down_weight", True)])
def test_what_would_be_dropped_for_its_age_does_not_go_on(tmp_path: Path, too_stale: str, goes_on: bool) -> None:
    settings: dict[str, Any] = {"asynchronous": {"max_staleness": 2, "too_stale": too_stale}}
    settings["train"] = {"old_logprobs": "engine"}
    run = restarted(tmp_path, {}, {0: [[1, 3], [3]]}, **settings)
    (now,) = taken_up(run, 0)
    assert len(now.begun) == 2 and oldest_version(now.begun) == 1
    run.ledger.close()
    state = {"step": FIRST, "version": FIRST, "prompts": run.prompts.state()}
    later = fake_run(tmp_path, resumed=state, **settings)
    later.version = 4
    (group,) = taken_up(later, 0)
    assert bool(group.begun) == goes_on and reasons(tmp_path) == (set() if goes_on else {"stale"})


def test_what_a_rollout_function_had_begun_is_neither_kept_nor_taken_up(tmp_path: Path) -> None:
    run = restarted(tmp_path, {0: [[3], [3]], 1: [[3, 4], [3]]}, {})
    run.play = lambda episode: None
    whole, cut = taken_up(run, 0, 1)
    assert whole.samples is not None and not cut.begun and not cut.samples
    cut.under_way = SimpleNamespace(id="x", done=None)  # type: ignore[assignment]
    run.engines.pool.partials = None  # type: ignore[method-assign, assignment]
    keep(run, [whole, cut])
