"""``megatron_vespo.plan``: loops in simulated time, against small cases worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from megatron_vespo.plan.clock import Clock
from megatron_vespo.plan.engine import Group
from megatron_vespo.plan.loops import LOOPS, simulate
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.pool import Pool
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.setup import Plant, Schedule, scaled
from megatron_vespo.plan.simulate import Simulation
from megatron_vespo.plan.workload import GroupShape, StatedLengths, log_normal_sigma

ONE = Plant(engines=1, engine_gpus=1, replicas=1, replica_gpus=1, in_flight=512)
ALONE = 65_536
"""A limit on responses at which each group is sent in a call of its own."""


@dataclass
class Fixed:
    """Groups of these lengths, in turn."""

    lengths: list[int]
    prompt: int = 5
    drawn: int = field(default=0)

    def draw(self, rng: np.random.Generator, size: int, longest: int) -> GroupShape:
        self.drawn += 1
        length = self.lengths[(self.drawn - 1) % len(self.lengths)]
        return GroupShape(self.prompt, np.full(size, length, np.int64))


def asynchronous(**settings: Any) -> Schedule:
    return Schedule(
        **({"mode": "asynchronous", "groups": 1, "size": 1, "longest": 10, "old_passes": "none"} | settings)
    )


# ------------------------------------------------------------------------------------------------------ engines


def finished(
    lengths: list[list[int]], rates: Rates, *, prompt: int = 10, engines: int = 1, room: int = 512
) -> list[float]:
    """When each group comes back; all are asked at 0."""
    clock, at = Clock(), {}
    pool = Pool(
        clock,
        rates,
        engines=engines,
        in_flight=room,
        longest=ALONE,
        done=lambda groups: at.update({group.number: clock.now for group in groups}),
    )
    pool.submit([Group(i, GroupShape(prompt, np.array(group))) for i, group in enumerate(lengths)])
    clock.run()
    return [at[i] for i in range(len(lengths))]


def test_a_step_takes_longer_the_more_run() -> None:
    rates = Rates(decode_step=1.0, decode_response=0.5, train_token=0)
    # Two steps of 1 + 2 x 0.5, then two of 1 + 0.5.
    assert finished([[2], [4]], rates) == pytest.approx([4.0, 7.0])
    # The prompts are computed first, one a group.
    assert finished([[2], [4]], rates.model_copy(update={"prefill_token": 0.1})) == pytest.approx([6.0, 9.0])
    assert finished([[2, 4]], rates.model_copy(update={"prefill_token": 0.1})) == pytest.approx([8.0])


def test_a_step_takes_longer_the_more_is_in_the_cache() -> None:
    rates = Rates(decode_step=1.0, decode_response=0.0, decode_context=0.01, train_token=0)
    # Two responses on prompts of 10: 2 steps over a context that grows from 20 to 24, then 2 from 12 to 14.
    first = 2 * 1.0 + 0.01 * (20 + 24) / 2 * 2
    assert finished([[2], [4]], rates) == pytest.approx([first, first + 2 * 1.0 + 0.01 * (12 + 14) / 2 * 2])


def test_what_does_not_fit_waits() -> None:
    rates = Rates(decode_step=1.0, decode_response=0.0, max_running=2, train_token=0)
    assert finished([[2], [4], [3]], rates) == pytest.approx([2.0, 4.0, 5.0])  # in the engine
    # Before the engines: a group of 2 has room only where nothing else is.
    unlimited = rates.model_copy(update={"max_running": 512})
    assert finished([[2, 2], [5, 5], [3, 3]], unlimited, engines=2, room=3) == pytest.approx([2.0, 5.0, 5.0])


def test_groups_of_one_call_come_back_together() -> None:
    clock, at = Clock(), {}
    rates = Rates(decode_step=1.0, decode_response=0.0, train_token=0)
    pool = Pool(
        clock,
        rates,
        engines=1,
        in_flight=512,
        longest=ALONE // 2,
        done=lambda groups: at.update({group.number: clock.now for group in groups}),
    )
    pool.submit([Group(i, GroupShape(1, np.array([length]))) for i, length in enumerate([2, 6, 3])])
    clock.run()
    assert at == {0: 6.0, 1: 6.0, 2: 3.0}


# ------------------------------------------------------------------------------------------------------ by hand


def test_a_synchronous_step_by_hand() -> None:
    rates = Rates(
        decode_step=1.0,
        decode_response=0.0,
        reward_response=0.5,
        old_logprobs_token=0.05,
        train_token=0.1,
        sync=3.0,
        step=1.0,
    )
    schedule = Schedule("synchronous", groups=4, size=2, longest=10, mini_batches=2)
    found = simulate(ONE, schedule, rates, Fixed([10]), updates=4, warmup=2)
    # 16 responses: 10 s of decoding, 8 of grading; 2 x 120 tokens: 2 x 6 s and 2 x 12 s; sync 3, driver 1.
    assert found.seconds == pytest.approx(2 * 58)
    assert (found.samples, found.tokens, found.updates) == (32, 32 * 15, 4)
    assert found.trainer_idle == pytest.approx(19 / 58)
    assert found.trainer_sync == pytest.approx(3 / 58)
    assert found.engine_idle == pytest.approx(48 / 58)
    assert found.staleness.tolist() == [160, 160]
    # On shared GPUs nothing changes but what handing them over costs, twice.
    shared = replace(ONE, shared=True)
    found = simulate(shared, schedule, rates.model_copy(update={"switch": 2.0}), Fixed([10]), updates=4, warmup=2)
    assert found.seconds == pytest.approx(2 * 62)


def test_an_asynchronous_run_by_hand() -> None:
    """One response an update, 10 tokens at 1 s, updates of 4 s, syncs of 1 s, at most one version behind.

    From 15 on, every 16 s: at 15 group 2 is asked, and group 1 trained till 19, its 10 tokens one version old. Sync
    till 20, when group 2 has 4 tokens; group 3 is asked. Group 2 is done at 26, 4 of its tokens a version old, 6 none,
    and trained till 30, when group 3 is done. Sync till 31.
    """
    rates = Rates(decode_step=1.0, decode_response=0.0, train_token=0, update=4.0, sync=1.0)
    found = simulate(ONE, asynchronous(max_staleness=1), rates, Fixed([10]), updates=8, warmup=2)
    assert found.seconds == pytest.approx(4 * 16)
    assert found.staleness.tolist() == [4 * 6, 4 * 14]
    assert found.trainer_idle == pytest.approx(6 / 16)
    assert found.trainer_sync == pytest.approx(2 / 16)
    assert found.engine_idle == pytest.approx(1 / 16)
    # The engines stand still only in the last quarter of a sync: group 2 has 4.75 tokens at 19.75, whole ones 4.
    paused = rates.model_copy(update={"sync_pause": 0.25})
    found = simulate(ONE, asynchronous(max_staleness=1), paused, Fixed([10]), updates=8, warmup=2)
    assert found.staleness[1] / found.staleness.sum() == pytest.approx(14 / 20)
    assert found.samples_per_s > 2 / 16


def test_a_sync_has_what_goes_on_computed_anew() -> None:
    rates = Rates(decode_step=1.0, decode_response=0.0, train_token=0, update=4.0, sync=1.0, prefill_token=0.5)
    without = simulate(ONE, asynchronous(max_staleness=1), rates, Fixed([10], prompt=0), updates=1, warmup=2)
    # As above, but at 20 the 4 tokens of group 2 cost 2 s: it is done at 28.
    assert without.seconds == pytest.approx(18 - 5)


def test_a_group_that_cannot_be_in_time_is_aborted_and_dropped() -> None:
    rates = Rates(decode_step=1.0, decode_response=0.0, train_token=0, update=1.0)
    lengths = Fixed([2, 1000, *[2] * 2000])
    schedule = asynchronous(max_staleness=1, longest=ALONE, too_stale="drop")
    found = simulate(ONE, schedule, rates, lengths, updates=20, warmup=0)
    assert (found.dropped_groups, found.trained) == (1, 20)
    assert found.staleness_max <= 1
    # Waiting for it, nothing is dropped, and the run stands still for most of its 1,000 steps.
    waits = simulate(ONE, replace(schedule, too_stale="wait"), rates, Fixed(lengths.lengths), updates=20, warmup=0)
    assert waits.dropped == 0 and waits.seconds > 1000 > 100 > found.seconds
    # Trained with less weight, it is overtaken like the dropped one, and counted.
    late = simulate(
        ONE, replace(schedule, too_stale="down_weight"), rates, Fixed(lengths.lengths), updates=999, warmup=0
    )
    assert late.dropped == 0 and late.late == pytest.approx(1 / 999)


def test_old_logprobs_are_computed_under_each_version_that_sampled() -> None:
    run = Simulation(
        replace(ONE, replicas=2, replica_gpus=2),
        asynchronous(old_passes="by version"),
        Rates(decode_step=1, decode_response=0, train_token=0.2, update=7, old_logprobs_pass=1, old_logprobs_token=0.1),
        Fixed([1]),
        seed=0,
    )
    group = Group(0, GroupShape(10, np.array([20, 30])), tokens={3: 40, 4: 10}, passed={3: 70, 4: 40})
    # Version 3: 70 tokens, so 40 (the longest) on the fuller replica, 20 on each of its GPUs; version 4: 40, so 20.
    assert run.old_pass_s([group]) == pytest.approx(1 + 0.1 * 20 + 1 + 0.1 * 20)
    assert run.update_s([group]) == pytest.approx(7 + 0.2 * 20)


# ------------------------------------------------------------------------------------------------------ what must hold

RATES = Rates(
    decode_step=0.02,
    decode_response=0.0005,
    decode_context=1e-7,
    prefill_token=1e-4,
    max_running=64,
    train_token=2e-4,
    old_logprobs_token=5e-5,
    update=0.5,
    sync=2.0,
    step=0.2,
)
LENGTHS = StatedLengths(mean=300, p95=900, prompt=40)
PLANT = Plant(engines=4, engine_gpus=1, replicas=4, replica_gpus=1, in_flight=64)
SCHEDULES = {
    "synchronous": Schedule("synchronous", 16, 4, 1000, mini_batches=4),
    "constant": Schedule("constant_lag", 16, 4, 1000, lag=3),
    "wait": Schedule("asynchronous", 16, 4, 1000, sync_every=2, max_staleness=3),
    "drop": Schedule("asynchronous", 16, 4, 1000, max_staleness=1, too_stale="drop", mini_batches=2),
    "down_weight": Schedule("asynchronous", 16, 4, 1000, max_staleness=1, too_stale="down_weight", max_open=24),
}


def run(schedule: Schedule, plant: Plant = PLANT, rates: Rates = RATES, **options: Any) -> Outcome:
    return simulate(plant, schedule, rates, LENGTHS, **{"updates": 16, "warmup": 8, **options})


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_group_is_accounted_for(name: str) -> None:
    found, again = run(SCHEDULES[name]), run(SCHEDULES[name])
    assert found.asked == found.trained + found.dropped_groups + found.open
    assert found.trained == 24 * 16 and found.samples == 16 * 16 * 4
    assert found.summary() | {"staleness_tokens": []} == again.summary() | {"staleness_tokens": []}
    assert found.seconds != run(SCHEDULES[name], seed=1).seconds
    if name in ("wait", "drop"):
        assert found.staleness_max <= SCHEDULES[name].max_staleness
    if name == "drop":
        assert found.dropped > 0
    if name == "constant":
        assert found.staleness.nonzero()[0].tolist() == [3]


def test_staleness_zero_is_synchronous() -> None:
    ours = run(replace(SCHEDULES["wait"], sync_every=1, max_staleness=0))
    theirs = run(replace(SCHEDULES["synchronous"], mini_batches=1))
    lag = run(replace(SCHEDULES["constant"], lag=0))
    for other in (theirs, lag):
        assert ours.seconds == pytest.approx(other.seconds, rel=1e-12)
        assert ours.tokens == other.tokens and ours.staleness.tolist() == other.staleness.tolist()
        assert ours.trainer_idle == pytest.approx(other.trainer_idle)
        assert ours.engine_idle == pytest.approx(other.engine_idle)
    # N mini-batches: with a sync every N updates and staleness N - 1 the same tokens at the same lags, sooner.
    ours = run(replace(SCHEDULES["wait"], sync_every=4, max_staleness=3, mini_batches=4))
    theirs = run(SCHEDULES["synchronous"])
    assert ours.staleness.tolist() == theirs.staleness.tolist() and ours.seconds <= theirs.seconds


def test_whichever_is_slower_sets_the_pace() -> None:
    free = Schedule("asynchronous", 16, 4, ALONE, max_staleness=40, too_stale="down_weight", old_passes="none")
    engines = Rates(decode_step=0.02, decode_response=0.0005, max_running=64, train_token=0)
    # With more given than can run, an engine always has 64 to decode: 64 / (0.02 + 64 x 0.0005) tokens a second.
    plant = replace(PLANT, in_flight=128)
    found = run(free, plant, engines, updates=120, warmup=60)
    decoded = (found.tokens - 40 * found.samples) / found.seconds
    assert decoded == pytest.approx(4 * 64 / 0.052, rel=0.03) and found.engine_idle < 0.01
    trainer = Rates(decode_step=1e-6, decode_response=0, train_token=2e-4, update=0.5)
    found = run(free, PLANT, trainer, updates=120, warmup=60)
    assert found.seconds == pytest.approx(120 * 0.5 + 2e-4 * found.tokens / 4, rel=1e-3)
    assert found.trainer_idle < 0.001


def test_more_of_anything_good_is_not_slower() -> None:
    def seconds(engines: int = 4, replicas: int = 4, staleness: int = 2, sync: float = 2.0) -> float:
        schedule = Schedule("asynchronous", 16, 4, 1000, max_staleness=staleness)
        plant = replace(PLANT, engines=engines, replicas=replicas)
        return run(schedule, plant, RATES.model_copy(update={"sync": sync})).seconds

    for name, values in {
        "engines": (2, 4, 8),
        "replicas": (2, 4, 8),
        "staleness": (0, 1, 2, 4),
        "sync": (8.0, 2.0, 0.0),
    }.items():
        times = [seconds(**{name: value}) for value in values]
        assert all(later <= 1.01 * earlier for earlier, later in itertools.pairwise(times)), (name, times)
        assert times[-1] < times[0]


@pytest.mark.parametrize("name", ["synchronous", "wait"])
def test_a_plant_in_small_behaves_as_the_whole(name: str) -> None:
    plant = Plant(engines=32, engine_gpus=2, replicas=12, replica_gpus=4, in_flight=64)
    schedule = replace(SCHEDULES[name], groups=128, max_open=512 if name == "wait" else None)
    rates = RATES.model_copy(update={"reward_response": 1e-3})
    whole = run(schedule, plant, rates, updates=8, warmup=8)
    small_plant, small, small_rates = scaled(plant, schedule, rates, 8)
    assert (small_plant.engines, small.groups, small_plant.replicas) == (4, 16, 1.5)
    found = run(small, small_plant, small_rates, updates=8, warmup=8)
    # How many groups share a call depends on how many are asked at once, and so do the stragglers.
    assert 8 * found.samples_per_s == pytest.approx(whole.samples_per_s, rel=0.1)
    assert found.staleness_mean == pytest.approx(whole.staleness_mean, rel=0.03)


def test_settings_that_would_wait_for_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="sync more often"):
        run(Schedule("asynchronous", 16, 4, 1000, sync_every=4, max_staleness=2))
    with pytest.raises(ValueError, match="raise the bound"):
        run(Schedule("asynchronous", 16, 4, 1000, max_open=15))
    with pytest.raises(ValueError, match="take turns"):
        run(SCHEDULES["wait"], replace(PLANT, shared=True))
    assert set(LOOPS) == {"synchronous", "asynchronous", "constant_lag"}


# ------------------------------------------------------------------------------------------------------ lengths


def test_stated_lengths_have_their_mean_and_percentile() -> None:
    drawn = StatedLengths(mean=4000, p95=12000).draw(np.random.default_rng(0), 200_000, 1 << 30).responses
    assert drawn.mean() == pytest.approx(4000, rel=0.02)
    assert np.quantile(drawn, 0.95) == pytest.approx(12000, rel=0.02)
    assert StatedLengths().draw(np.random.default_rng(0), 1000, 500).responses.max() == 500
    with pytest.raises(ValueError, match=r"between 1 and 3\.9"):
        log_normal_sigma(100, 400)
