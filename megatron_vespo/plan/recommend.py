"""Which split of the GPUs, and how often to sync: every candidate is simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_vespo.plan.loops import simulate
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.setup import Plant, Schedule, scaled
from megatron_vespo.plan.workload import Workload

RESPONSES = 40_000
"""Simulated of a candidate; a larger one is scaled down (setup.scaled)."""
LEAST_ENGINES = 4
"""A plant is not scaled down to fewer."""
LEAST_SHARE = 1 / 16
"""Of the GPUs, which either side gets, where so many splits are possible that not all are tried."""
ALIKE = 0.01
"""Throughputs that differ by less are the same, and the fresher one is taken."""
DROPPED_AT_MOST = 0.05


@dataclass(frozen=True)
class Candidate:
    """One simulated set-up. ``outcome`` is of the whole plant, whatever was simulated."""

    plant: Plant
    schedule: Schedule
    outcome: Outcome
    scale: float
    """The plant is so many times larger than what was simulated."""


class Forecast:
    """Simulates candidates, all with the same seed."""

    def __init__(self, rates: Rates, workload: Workload, *, seed: int = 0, responses: int = RESPONSES) -> None:
        self.rates, self.workload, self.seed, self.responses = rates, workload, seed, responses

    def of(self, plant: Plant, schedule: Schedule) -> Candidate:
        """Raises ValueError where settings do not go together."""
        warmup, updates = window(schedule)
        wanted = (warmup + updates) * schedule.groups * schedule.size / self.responses
        factor = min(wanted, plant.engines / LEAST_ENGINES)
        small, small_schedule, rates = scaled(plant, schedule, self.rates, factor)
        outcome = simulate(small, small_schedule, rates, self.workload, updates=updates, warmup=warmup, seed=self.seed)
        scale = schedule.groups / small_schedule.groups
        if scale > 1:
            outcome = replace(outcome, samples=round(outcome.samples * scale), tokens=round(outcome.tokens * scale))
        return Candidate(plant, schedule, outcome, scale)

    def splits(self, gpus: int, plant: Plant, schedule: Schedule, *, step: int = 1, most: int = 8) -> list[Candidate]:
        """``gpus`` between engines and trainer, the sizes of an engine and of a replica being ``plant``'s; replicas in
        multiples of ``step``. At most ``most`` shares at first, then those between the best and its neighbours."""
        units = list(trainer_units(gpus, plant, step))
        if len(units) > most:
            least = LEAST_SHARE * gpus
            units = [unit for unit in units if least <= unit * plant.replica_gpus <= gpus - least]
        found = {unit: self.of(_split(gpus, plant, unit), schedule) for unit in _spread(units, most)}
        while found:
            best = max(found, key=lambda unit: found[unit].outcome.samples_per_s)
            between = [unit for unit in _beside(units, sorted(found), best) if unit not in found]
            if not between or len(found) >= most + 4:
                return [found[unit] for unit in sorted(found)]
            found.update({unit: self.of(_split(gpus, plant, unit), schedule) for unit in between})
        return []

    def intervals(self, plant: Plant, schedule: Schedule) -> list[Candidate]:
        """Syncs every 1, 2, 4, ... updates, as far as the maximum staleness goes; [] where the loop syncs each step."""
        if schedule.mode != "asynchronous":
            return []
        most = schedule.max_staleness + 1
        values = sorted({schedule.sync_every} | {2**i for i in range(int(math.log2(most)) + 1)})
        return [self.of(plant, replace(schedule, sync_every=value)) for value in values if value <= most]


def window(schedule: Schedule) -> tuple[int, int]:
    """Updates not counted, and counted: as many as fill the window of staleness twice, and enough for its mean."""
    deep = 2 * (max(schedule.max_staleness, schedule.lag) + 1)
    return max(4, deep), max(12, deep, 2 * schedule.mini_batches, 4 * schedule.sync_every)


def recommended(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest that drops at most :data:`DROPPED_AT_MOST`; of those as fast within :data:`ALIKE`, the one whose
    tokens are freshest. Raises ValueError where there is none."""
    if not candidates:
        raise ValueError("no split of these GPUs leaves room for one engine and one trainer replica")
    able = [c for c in candidates if c.outcome.dropped <= DROPPED_AT_MOST] or list(candidates)
    most = max(c.outcome.samples_per_s for c in able)
    alike = [c for c in able if c.outcome.samples_per_s >= (1 - ALIKE) * most]
    return min(alike, key=lambda c: (c.outcome.staleness_mean, -c.outcome.samples_per_s))


def trainer_units(gpus: int, plant: Plant, step: int) -> Iterator[int]:
    """Numbers of replicas that leave room for an engine."""
    for replicas in range(step, gpus // plant.replica_gpus + 1, step):
        if gpus - replicas * plant.replica_gpus >= plant.engine_gpus:
            yield replicas


def _split(gpus: int, plant: Plant, replicas: int) -> Plant:
    engines = (gpus - replicas * plant.replica_gpus) // plant.engine_gpus
    return replace(plant, engines=engines, replicas=replicas, shared=False)


def _spread(units: Sequence[int], most: int) -> list[int]:
    if len(units) <= most:
        return list(units)
    return sorted({units[round(i * (len(units) - 1) / (most - 1))] for i in range(most)})


def _beside(units: Sequence[int], known: list[int], best: int) -> Iterator[int]:
    """What lies in the middle between ``best`` and the known one on either side."""
    place = known.index(best)
    for neighbour in known[max(0, place - 1) : place] + known[place + 1 : place + 2]:
        low, high = sorted((units.index(best), units.index(neighbour)))
        if high - low > 1:
            yield units[(low + high) // 2]
