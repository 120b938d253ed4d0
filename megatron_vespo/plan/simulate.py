"""The loops, in simulated time. Each process reads as its loop in megatron_vespo/loop/."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from megatron_vespo.plan.clock import Clock, Process, Signal
from megatron_vespo.plan.engine import Group, Pool
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.setup import Plant, Schedule
from megatron_vespo.plan.workload import Workload


def simulate(
    plant: Plant,
    schedule: Schedule,
    rates: Rates,
    workload: Workload,
    *,
    updates: int = 32,
    warmup: int = 8,
    seed: int = 0,
) -> Outcome:
    """``updates`` updates after ``warmup`` that are not counted (both rounded up to whole steps and sync intervals).

    The same arguments give the same outcome. Raises ValueError where the settings would wait for each other for ever.
    """
    check(plant, schedule)
    simulation = Simulation(plant, schedule, rates, workload, seed)
    unit = schedule.mini_batches if schedule.loop == "synchronous" else schedule.sync_every
    first = -(-warmup // unit) * unit
    last = first + -(-updates // unit) * unit
    simulation.start()
    simulation.run_to(first)
    before = simulation.counters()
    simulation.run_to(last)
    return simulation.outcome(before, simulation.counters())


def check(plant: Plant, schedule: Schedule) -> None:
    """Raises ValueError naming the settings that cannot go together."""
    if schedule.loop == "asynchronous" and schedule.max_staleness < schedule.sync_every - 1:
        raise ValueError(
            f"a maximum staleness of {schedule.max_staleness} with a sync every {schedule.sync_every} updates: the last "
            f"update before a sync trains tokens at least {schedule.sync_every - 1} versions old; sync more often"
        )
    if schedule.open_groups is not None and schedule.open_groups < schedule.groups:
        raise ValueError(
            f"at most {schedule.open_groups} open prompt groups, and an update takes {schedule.groups}: raise the bound"
        )
    if plant.shared and schedule.loop != "synchronous":
        raise ValueError("trainer and engines share GPUs: that is for the synchronous loop")
    if min(plant.engines, plant.replicas, schedule.groups) <= 0:
        raise ValueError("there has to be an engine, a trainer replica and a prompt group")


@dataclass
class Counters:
    """Sums since the start."""

    time: float = 0.0
    updates: int = 0
    samples: int = 0
    tokens: int = 0
    asked: int = 0
    trained: int = 0
    dropped: int = 0
    late_tokens: int = 0
    waited_s: float = 0.0
    synced_s: float = 0.0
    engine_busy_s: float = 0.0
    response_s: float = 0.0


class Simulation:
    def __init__(self, plant: Plant, schedule: Schedule, rates: Rates, workload: Workload, seed: int) -> None:
        self.plant, self.schedule, self.rates, self.workload = plant, schedule, rates, workload
        self.rng = np.random.default_rng(seed)
        self.clock = Clock()
        self.pool = Pool(self.clock, rates, plant.engines, plant.in_flight, self._generated)
        self.count = Counters()
        self.staleness = np.zeros(16, np.int64)
        self.version = 0
        """Of the trainer."""
        self.synced = 0
        """Of the engines."""
        self.ready: deque[Group] = deque()
        """Graded, waiting for the trainer."""
        self.changed = Signal()
        """Something was generated, graded, trained, dropped or synced."""

    def start(self) -> None:
        if self.schedule.loop == "synchronous":
            self.clock.start(synchronous(self))
        elif self.schedule.loop == "constant":
            self.clock.start(constant_sampler(self))
            self.clock.start(constant_trainer(self))
        else:
            self.clock.start(asker(self))
            self.clock.start(trainer(self))

    def run_to(self, updates: int) -> None:
        self.clock.run(lambda: self.count.updates >= updates)
        if self.count.updates < updates:
            raise ValueError(f"after {self.count.updates} updates nothing more could happen: {self.schedule}")

    # --- what the loops are written in --------------------------------------------------------------------------

    def ask(self) -> Group:
        """The next prompt group goes to the engines."""
        shape = self.workload.draw(self.rng, self.schedule.size, self.schedule.longest)
        group = Group(self.count.asked, shape, left=len(shape.responses))
        self.count.asked += 1
        self.pool.submit(group)
        return group

    def open(self) -> int:
        return self.count.asked - self.count.trained - self.count.dropped

    def _generated(self, group: Group) -> None:
        delay = 0.0
        if self.schedule.loop != "synchronous":
            delay = self.rates.reward_batch + self.rates.reward_response * self.schedule.size
        self.clock.at(self.clock.now + delay, self._graded, group)

    def _graded(self, group: Group) -> None:
        self.ready.append(group)
        self.clock.fire(self.changed)

    def passes_s(self, batch: list[Group]) -> tuple[float, float]:
        """Seconds of the old-log-prob pass and of the update. The fullest replica decides: it has its share of the
        tokens, or the longest sequence."""
        longest = max(group.shape.prompt + int(group.shape.responses.max()) for group in batch)
        tokens = max(sum(group.shape.tokens for group in batch) / self.plant.replicas, longest) / self.plant.replica_gpus
        rates = self.rates
        return (
            rates.old_logprobs_pass + rates.old_logprobs_token * tokens,
            rates.update + rates.train_token * tokens,
        )

    def trained(self, batch: list[Group]) -> None:
        """The update is done."""
        for group in batch:
            for version, tokens in group.tokens_by_version.items():
                lag = self.version - version
                if lag >= len(self.staleness):
                    self.staleness = np.pad(self.staleness, (0, lag))
                self.staleness[lag] += tokens
                if self.schedule.loop == "asynchronous" and lag > self.schedule.max_staleness:
                    self.count.late_tokens += tokens
            self.count.samples += len(group.shape.responses)
            self.count.tokens += group.shape.tokens
        self.count.trained += len(batch)
        self.version += 1

    def is_late(self, group: Group) -> bool:
        return self.version - min(group.tokens_by_version) > self.schedule.max_staleness

    def sync(self) -> Process:
        """Trainer and engines; what runs goes on under the new weights."""
        self.count.synced_s += self.rates.sync
        yield self.rates.sync - self.rates.pause
        self.pool.pause()
        yield self.rates.pause
        self.pool.resume(self.version)
        self.synced = self.version
        self.clock.fire(self.changed)

    def wait(self) -> Process:
        """The trainer, for something to change."""
        start = self.clock.now
        yield self.changed
        self.count.waited_s += self.clock.now - start

    # --- what came of it ----------------------------------------------------------------------------------------

    def counters(self) -> tuple[Counters, np.ndarray]:
        self.pool.bring_up()
        engines = self.pool.engines
        return (
            replace(
                self.count,
                time=self.clock.now,
                engine_busy_s=sum(engine.busy_s for engine in engines) / len(engines),
                response_s=sum(engine.response_s for engine in engines) / len(engines),
            ),
            self.staleness.copy(),
        )

    def outcome(self, before: tuple[Counters, np.ndarray], after: tuple[Counters, np.ndarray]) -> Outcome:
        (old, old_lags), (new, lags) = before, after
        lags[: len(old_lags)] -= old_lags
        seconds = new.time - old.time
        groups = new.trained + new.dropped - old.trained - old.dropped
        return Outcome(
            seconds=seconds,
            updates=new.updates - old.updates,
            samples=new.samples - old.samples,
            tokens=new.tokens - old.tokens,
            staleness=np.trim_zeros(lags, "b"),
            trainer_idle=(new.waited_s - old.waited_s) / seconds,
            trainer_sync=(new.synced_s - old.synced_s) / seconds,
            engine_idle=1 - (new.engine_busy_s - old.engine_busy_s) / seconds,
            engine_fill=(new.response_s - old.response_s) / seconds,
            dropped=(new.dropped - old.dropped) / max(1, groups),
            late=(new.late_tokens - old.late_tokens) / max(1, int(lags.sum())),
            asked=new.asked,
            trained=new.trained,
            dropped_groups=new.dropped,
            open=self.open(),
        )


# ------------------------------------------------------------------------------------------------------ synchronous


def synchronous(run: Simulation) -> Process:
    """loop/synchronous.py: a rollout batch, graded, cut into N mini-batches, then a sync."""
    schedule, rates = run.schedule, run.rates
    size = schedule.groups * schedule.mini_batches
    while True:
        start = run.clock.now
        for _ in range(size):
            run.ask()
        while len(run.ready) < size:
            yield run.changed
        yield rates.reward_batch + rates.reward_response * size * schedule.size
        if run.plant.shared:
            yield rates.switch
        run.count.waited_s += run.clock.now - start
        # In the order of the batch, not in that of arrival.
        batch = sorted(run.ready, key=lambda group: group.number)
        run.ready.clear()
        parts = [batch[i : i + schedule.groups] for i in range(0, size, schedule.groups)]
        for part in parts:
            yield run.passes_s(part)[0]
        for part in parts:
            yield run.passes_s(part)[1]
            run.trained(part)
        yield from run.sync()
        start = run.clock.now
        yield rates.step + rates.step_response * size * schedule.size + (rates.switch if run.plant.shared else 0.0)
        run.count.waited_s += run.clock.now - start
        run.count.updates += schedule.mini_batches


# ----------------------------------------------------------------------------------------------------- asynchronous


def asker(run: Simulation) -> Process:
    """Asks for groups while they can still be trained within the maximum staleness, and while few enough are open."""
    schedule = run.schedule
    while True:
        trainable = schedule.groups * (run.synced + schedule.max_staleness + 1)
        bound = schedule.open_groups
        while run.count.asked - run.count.dropped < trainable and (bound is None or run.open() < bound):
            run.ask()
        yield run.changed


def trainer(run: Simulation) -> Process:
    schedule, rates = run.schedule, run.rates
    while True:
        batch: list[Group] = []
        while len(batch) < schedule.groups:
            if not run.ready:
                yield from run.wait()
                continue
            group = run.ready.popleft()
            if schedule.late == "drop" and run.is_late(group):
                run.count.dropped += 1
                run.clock.fire(run.changed)
                continue
            batch.append(group)
        for seconds in run.passes_s(batch):
            yield seconds
        run.trained(batch)
        run.clock.fire(run.changed)
        if run.version % schedule.sync_every == 0:
            yield from run.sync()
        yield rates.step + rates.step_response * len(batch) * schedule.size
        run.count.updates += 1


# ----------------------------------------------------------------------------------------------------- constant lag


def constant_sampler(run: Simulation) -> Process:
    """Update u trains what version u - lag sampled, whole: what comes before version 0 is of version 0."""
    for update in count():
        while run.synced < update - run.schedule.lag:
            yield run.changed
        asked = [run.ask() for _ in range(run.schedule.groups)]
        while any(group.left for group in asked):
            yield run.changed


def constant_trainer(run: Simulation) -> Process:
    schedule, rates = run.schedule, run.rates
    while True:
        while len(run.ready) < schedule.groups:
            yield from run.wait()
        batch = [run.ready.popleft() for _ in range(schedule.groups)]
        for seconds in run.passes_s(batch):
            yield seconds
        run.trained(batch)
        # No response may have two versions: the sync waits for what is being sampled, which the next one trains.
        while run.count.asked < schedule.groups * min(run.version + schedule.lag, run.synced + schedule.lag + 1) or any(
            engine.load for engine in run.pool.engines
        ):
            yield from run.wait()
        yield from run.sync()
        yield rates.step + rates.step_response * len(batch) * schedule.size
        run.count.updates += 1
