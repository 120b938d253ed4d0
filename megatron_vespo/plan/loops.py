"""The loops as processes in simulated time; each reads as its file in megatron_vespo/loop/."""

from __future__ import annotations

from collections import deque
from itertools import islice

from megatron_vespo.plan.clock import Process
from megatron_vespo.plan.engine import Group
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.setup import Plant, Schedule
from megatron_vespo.plan.simulate import Simulation, run_loop
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
    """``updates`` updates after ``warmup`` that are not counted. The same arguments give the same outcome.

    Raises ValueError where settings do not go together.
    """
    simulation = Simulation(plant, schedule, rates, workload, seed)
    return run_loop(LOOPS[schedule.mode], simulation, updates=updates, warmup=warmup)


# -------------------------------------------------------------------------------------------------- taking turns


def synchronous(run: Simulation) -> Process:
    while True:
        batch = yield from collect(run)
        size = run.schedule.groups
        mini_batches = [batch[i : i + size] for i in range(0, len(batch), size)]
        for mini_batch in mini_batches:
            yield run.old_pass_s(mini_batch)
        for mini_batch in mini_batches:
            yield from run.update(mini_batch)
        yield from run.sync()
        yield from run.end_step()


def constant_lag(run: Simulation) -> Process:
    ahead: deque[list[Group]] = deque()
    while True:
        while len(ahead) <= run.schedule.lag:
            batch = yield from collect(run)
            yield run.old_pass_s(batch)
            ahead.append(batch)
        yield from run.update(ahead.popleft())
        yield from run.sync()
        yield from run.end_step()


def collect(run: Simulation):  # type: ignore[no-untyped-def]  # a Process that returns the batch
    """One rollout batch, sampled and graded, in the order of its prompts. Returns it."""
    size, switch = run.schedule.groups * run.schedule.mini_batches, run.rates.switch if run.plant.shared else 0.0

    def batch() -> Process:
        yield switch
        run.ask(size)
        while len(run.sampled) < size:
            yield run.arrived
        yield run.grading_s(size) + switch

    yield from run.waiting(batch())
    groups = sorted(run.sampled, key=lambda group: group.number)
    run.sampled.clear()
    run.take(groups)
    return groups


# -------------------------------------------------------------------------------------------------- side by side


class Rollouts:
    """loop/rollouts.py: groups are asked for when some were taken or dropped, while they can be trained in time."""

    def __init__(self, run: Simulation) -> None:
        self.run, self.schedule = run, run.schedule
        self.version = 0
        """That the groups taken next are trained at."""
        self.aborted: set[int] = set()

    def train(self) -> Process:
        run, schedule = self.run, self.schedule
        while True:
            for _ in range(schedule.mini_batches):
                self.ask()
                yield from run.waiting(self.wait())
                mini_batch = self.chosen()
                run.take(mini_batch)
                self.version += 1
                self.abort_hopeless()
                self.ask()
                yield run.old_pass_s(mini_batch)
                yield from run.update(mini_batch)
                if run.version - run.served >= schedule.sync_every:
                    yield from run.sync()
            yield from run.end_step()

    def grade(self) -> Process:
        run = self.run
        while True:
            while not run.sampled:
                yield run.arrived
            groups = list(run.sampled)
            run.sampled.clear()
            whole = [group for group in groups if not group.cut]
            yield run.grading_s(len(whole)) if whole else 0.0
            stale = [group for group in groups if group.cut and self.is_stale(group)]
            again = [group for group in groups if group.cut and not self.is_stale(group)]
            run.drop(stale)
            run.ready.update({group.number: group for group in whole})
            for group in again:
                group.served = run.served
                self.aborted.discard(group.number)
                run.pool.submit([group])
            run.clock.fire(run.changed)
            if stale:
                self.ask()

    def ask(self) -> None:
        schedule = self.schedule
        bound = schedule.groups * (self.run.served + schedule.max_staleness - self.version + 1)
        if schedule.max_open is not None:
            bound = min(bound, schedule.max_open)
        if bound > len(self.run.open):
            self.run.ask(bound - len(self.run.open))

    def wait(self) -> Process:
        while True:
            dropped = self.drop_stale()
            if self.chosen():
                return
            if dropped:
                self.ask()
            else:
                yield self.run.changed

    def chosen(self) -> list[Group]:
        """Of the next update; [] where they are not all there."""
        run, size = self.run, self.schedule.groups
        if len(run.ready) < size:
            return []
        # Both are in order: of being asked, of being done.
        first = islice(run.open if self.schedule.too_stale == "wait" else run.ready, size)
        groups = [run.ready[number] for number in sorted(first) if number in run.ready]
        return groups if len(groups) == size else []

    def is_stale(self, group: Group) -> bool:
        return self.run.staleness(group, self.version) > self.schedule.max_staleness

    def drop_stale(self) -> list[Group]:
        if self.schedule.too_stale != "drop":
            return []
        stale = [group for group in self.run.ready.values() if self.is_stale(group)]
        self.run.drop(stale)
        return stale

    def abort_hopeless(self) -> None:
        if self.schedule.too_stale != "drop":
            return
        run = self.run
        hopeless = [
            group
            for number, group in run.open.items()
            if number not in run.ready
            and number not in self.aborted
            and self.version - group.served > self.schedule.max_staleness
        ]
        for group in hopeless:
            self.aborted.add(group.number)
            run.pool.abort(group)


def _asynchronous(run: Simulation) -> list[Process]:
    rollouts = Rollouts(run)
    return [rollouts.grade(), rollouts.train()]


LOOPS = {
    "synchronous": lambda run: [synchronous(run)],
    "constant_lag": lambda run: [constant_lag(run)],
    "asynchronous": _asynchronous,
}
