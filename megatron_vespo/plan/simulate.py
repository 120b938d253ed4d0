"""A run in simulated time: what the loops (loops.py) are written in, and what came of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from megatron_vespo.plan.clock import Clock, Process, Signal
from megatron_vespo.plan.engine import Group
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.pool import Pool
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.setup import Plant, Schedule
from megatron_vespo.plan.workload import Workload


def check(plant: Plant, schedule: Schedule) -> None:
    """Raises ValueError naming the settings that cannot go together."""
    if schedule.mode == "asynchronous" and schedule.max_staleness < schedule.sync_every - 1:
        raise ValueError(
            f"a maximum staleness of {schedule.max_staleness} with a sync every {schedule.sync_every} updates: the "
            f"last update before a sync trains tokens at least {schedule.sync_every - 1} versions old; sync more often"
        )
    if schedule.max_open is not None and schedule.max_open < schedule.groups:
        raise ValueError(
            f"at most {schedule.max_open} open prompt groups, and an update takes {schedule.groups}: raise the bound"
        )
    if plant.shared and schedule.mode == "asynchronous":
        raise ValueError("trainer and engines share GPUs: that is for loops in which they take turns")
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
    taken: int = 0
    trained: int = 0
    dropped: int = 0
    late: int = 0
    """Groups trained that had a token older than the maximum."""
    waited_s: float = 0.0
    synced_s: float = 0.0
    engine_busy_s: float = 0.0
    response_s: float = 0.0
    lags: np.ndarray = field(default_factory=lambda: np.zeros(16, np.int64))
    """[lags] response tokens trained."""


class Simulation:
    """``start`` a loop of loops.py, ``run_to`` a number of steps, take ``counters``."""

    def __init__(self, plant: Plant, schedule: Schedule, rates: Rates, workload: Workload, seed: int) -> None:
        check(plant, schedule)
        self.plant, self.schedule, self.rates, self.workload = plant, schedule, rates, workload
        self.rng = np.random.default_rng(seed)
        self.clock = Clock()
        self.pool = Pool(
            self.clock,
            rates,
            engines=plant.engines,
            in_flight=plant.in_flight,
            longest=schedule.longest,
            done=self._came_back,
        )
        self.count = Counters()
        self.step = 0
        self.version = 0
        """Of the trainer."""
        self.served = 0
        """Of the engines."""
        self.sampled: deque[Group] = deque()
        """Not yet graded."""
        self.arrived = Signal()
        """Something was sampled."""
        self.ready: dict[int, Group] = {}
        """Graded and not yet taken, by number, in the order in which they were done."""
        self.open: dict[int, Group] = {}
        """Asked, neither taken nor dropped, by number."""
        self.changed = Signal()
        """Something is ready."""

    def run_to(self, step: int) -> None:
        self.clock.run(lambda: self.step >= step)
        if self.step < step:
            raise ValueError(f"after {self.step} steps nothing more could happen: {self.schedule}")

    # --- the engines' side --------------------------------------------------------------------------------------

    def ask(self, groups: int) -> list[Group]:
        """The next prompts go to the engines; those of a rollout batch together, where groups are taken in order."""
        asked = []
        for _ in range(groups):
            shape = self.workload.draw(self.rng, self.schedule.size, self.schedule.longest)
            group = Group(self.count.asked, shape, self.served)
            self.count.asked += 1
            self.open[group.number] = group
            asked.append(group)
        together = self.schedule.groups * self.schedule.mini_batches if self.schedule.too_stale == "wait" else 1
        for _, members in groupby(asked, key=lambda group: group.number // together):
            self.pool.submit(list(members))
        return asked

    def _came_back(self, groups: list[Group]) -> None:
        self.sampled.extend(groups)
        self.clock.fire(self.arrived)

    def grading_s(self, groups: int) -> float:
        return self.rates.reward_batch + self.rates.reward_response * groups * self.schedule.size

    def staleness(self, group: Group, version: int) -> int:
        """Of its oldest token, in an update that begins from ``version``; 0 where it has none."""
        return 0 if group.oldest is None else version - group.oldest

    # --- the trainer's side -------------------------------------------------------------------------------------

    def take(self, groups: list[Group]) -> None:
        for group in groups:
            del self.open[group.number]
            self.ready.pop(group.number, None)
        self.count.taken += len(groups)

    def drop(self, groups: list[Group]) -> None:
        for group in groups:
            del self.open[group.number]
            self.ready.pop(group.number, None)
        self.count.dropped += len(groups)

    def old_pass_s(self, batch: list[Group]) -> float:
        """Seconds of computing the old log-probs of a mini-batch."""
        if self.schedule.old_passes == "none":
            return 0.0
        whole = sum(group.shape.tokens for group in batch)
        by_version: dict[int, int] = {}
        for group in batch if self.schedule.old_passes == "by version" else ():
            for version, tokens in group.passed.items():
                by_version[version] = by_version.get(version, 0) + tokens
        return sum(
            self.rates.old_logprobs_pass + self.rates.old_logprobs_token * self._fullest(batch, tokens)
            for tokens in by_version.values() or (whole,)
        )

    def update_s(self, batch: list[Group]) -> float:
        tokens = self._fullest(batch, sum(group.shape.tokens for group in batch))
        return self.rates.update + self.rates.train_token * tokens

    def _fullest(self, batch: list[Group], tokens: int) -> float:
        """Tokens a GPU of the fullest replica, which has its share of them or the longest sequence."""
        longest = max(group.shape.prompt + int(group.shape.responses.max()) for group in batch)
        return max(tokens / self.plant.replicas, min(tokens, longest)) / self.plant.replica_gpus

    def update(self, batch: list[Group]) -> Process:
        yield self.update_s(batch)
        count = self.count
        for group in batch:
            for version, tokens in group.tokens.items():
                lag = self.version - version
                if lag >= len(count.lags):
                    count.lags = np.pad(count.lags, (0, lag))
                count.lags[lag] += tokens
            count.late += self.staleness(group, self.version) > self.schedule.max_staleness
            count.samples += len(group.shape.responses)
            count.tokens += group.shape.tokens
        count.trained += len(batch)
        count.updates += 1
        self.version += 1

    def sync(self) -> Process:
        """Responses under way go on under the new weights."""
        self.count.synced_s += self.rates.sync
        yield self.rates.sync - self.rates.pause
        self.pool.pause()
        yield self.rates.pause
        self.pool.resume(self.version)
        self.served = self.version

    def end_step(self) -> Process:
        driver = self.rates.step + self.rates.step_response * self.schedule.size * self.schedule.groups * (
            self.schedule.mini_batches
        )
        self.count.waited_s += driver
        yield driver
        self.step += 1

    def waiting(self, process: Process) -> Process:
        """What the trainer has to wait for."""
        start = self.clock.now
        yield from process
        self.count.waited_s += self.clock.now - start

    # --- what came of it ----------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        self.pool.bring_up()
        engines = self.pool.engines
        return replace(
            self.count,
            time=self.clock.now,
            engine_busy_s=sum(engine.busy_s for engine in engines) / len(engines),
            response_s=sum(engine.response_s for engine in engines) / len(engines),
            lags=self.count.lags.copy(),
        )

    def outcome(self, old: Counters, new: Counters) -> Outcome:
        """Of the time between two counts."""
        seconds = new.time - old.time
        lags = new.lags.copy()
        lags[: len(old.lags)] -= old.lags
        trained, dropped = new.trained - old.trained, new.dropped - old.dropped
        return Outcome(
            seconds=seconds,
            updates=new.updates - old.updates,
            samples=new.samples - old.samples,
            tokens=new.tokens - old.tokens,
            staleness=np.trim_zeros(lags, "b"),
            trainer_idle=(new.waited_s - old.waited_s) / seconds,
            trainer_sync=(new.synced_s - old.synced_s) / seconds,
            engine_idle=max(0.0, 1 - (new.engine_busy_s - old.engine_busy_s) / seconds),
            engine_running=(new.response_s - old.response_s) / seconds,
            dropped=dropped / max(1, trained + dropped),
            late=(new.late - old.late) / max(1, trained) if self.schedule.mode == "asynchronous" else 0.0,
            asked=new.asked,
            trained=new.trained,
            dropped_groups=new.dropped,
            open=len(self.open) + new.taken - new.trained,
        )


def run_loop(
    loop: Callable[[Simulation], list[Process]], simulation: Simulation, *, updates: int, warmup: int
) -> Outcome:
    """``updates`` updates after ``warmup`` that are not counted, both rounded up to whole steps and sync intervals."""
    schedule = simulation.schedule
    unit = schedule.mini_batches
    if schedule.mode == "asynchronous":
        unit = math.lcm(unit, schedule.sync_every)
    first = -(-warmup // unit) * unit // schedule.mini_batches
    last = first + -(-updates // unit) * unit // schedule.mini_batches
    for process in loop(simulation):
        simulation.clock.start(process)
    simulation.run_to(first)
    before = simulation.counters()
    simulation.run_to(last)
    return simulation.outcome(before, simulation.counters())
