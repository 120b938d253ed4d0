"""Dynamic sampling: which groups make the batch, and that the counts add up."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_vespo.loop.collect import collect
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.stream import PromptStream

GROUP = 2


class FakeRun:
    """Prompts 0, 1, 2, ...; of those whose number is in ``flat`` both responses get the same reward."""

    def __init__(self, flat: set[int], *, prompts_per_step: int = 4, **rollout: Any) -> None:
        settings = dict(samples_per_prompt=GROUP, dynamic_sampling=True, over_sample=1.0, max_rounds=8)
        self.config = SimpleNamespace(
            rollout=SimpleNamespace(**(settings | rollout)), train=SimpleNamespace(prompts_per_step=prompts_per_step)
        )
        self.flat = flat
        self.metrics = MetricSums()
        self.prompts = PromptStream([Prompt(str(i), np.zeros(1, np.int32), "", "") for i in range(20)], seed=0)
        self.prompts._order = np.arange(20)
        self.rounds: list[int] = []
        self.dropped: dict[int, str] = {}

    def phase(self, name: str) -> Any:
        return nullcontext()

    def rollout(self, prompts: list[Prompt], *, step: int, batch: str) -> list[Sample]:
        self.rounds.append(len(prompts))
        empty = np.zeros(1, np.int32)
        return [
            Sample(f"{batch}/{p.id}/{i}", p, empty, empty, empty, empty.astype(bool), "stop", metadata={"i": i})
            for p in prompts
            for i in range(GROUP)
        ]

    def drop(self, groups: list[list[Sample]], reason: str) -> None:
        self.dropped |= {int(group[0].prompt.id): reason for group in groups}

    def reward(self, samples: list[Sample]) -> None:
        for sample in samples:
            sample.reward = 1.0 if int(sample.prompt.id) in self.flat else float(sample.metadata["i"])


def groups(samples: list[Sample]) -> list[int]:
    assert all(a.prompt is b.prompt for a, b in zip(samples[::2], samples[1::2], strict=True))
    return [int(s.prompt.id) for s in samples[::2]]


def test_without_it_every_group_stays() -> None:
    run = FakeRun({1, 2}, dynamic_sampling=False)
    assert groups(collect(run, 0)) == [0, 1, 2, 3]  # type: ignore[arg-type]
    assert not run.metrics.sums


def test_groups_without_spread_are_replaced_by_further_prompts() -> None:
    run = FakeRun({1, 2, 5})
    assert groups(collect(run, 0)) == [0, 3, 4, 6]  # type: ignore[arg-type]
    assert run.rounds == [4, 2, 1]
    assert run.dropped == dict.fromkeys((1, 2, 5), "no spread")
    means = run.metrics.means()
    assert means["dynamic_sampling/rounds"] == 3
    assert means["dynamic_sampling/without_spread"] == 3 / 7 and means["dynamic_sampling/dropped"] == 3 / 7


def test_over_sampling_asks_for_more_and_drops_what_is_beyond_the_batch() -> None:
    run = FakeRun({0}, over_sample=1.5)
    assert groups(collect(run, 0)) == [1, 2, 3, 4]  # type: ignore[arg-type]
    assert run.rounds == [6]
    assert run.dropped == {0: "no spread", 5: "beyond the batch"}
    assert run.metrics.means()["dynamic_sampling/dropped"] == 2 / 6


def test_after_the_last_round_groups_without_spread_fill_the_batch() -> None:
    run = FakeRun(set(range(20)) - {2}, max_rounds=2)
    assert groups(collect(run, 0)) == [2, 0, 1, 3]  # type: ignore[arg-type]
    assert run.rounds == [4, 3]
    assert run.dropped == dict.fromkeys((4, 5, 6), "no spread")
