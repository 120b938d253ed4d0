"""What is simulated: how many GPUs do what, and the loop's settings. The one place that reads the run's config."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_vespo.config.engine_flags import engine_ranks
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.plan.rates import Rates

OldPasses = Literal["one", "by version", "none"]


@dataclass(frozen=True, slots=True)
class Plant:
    """Who has which GPUs."""

    engines: int
    engine_gpus: int
    """GPUs of one engine."""
    replicas: float
    """Data-parallel replicas of the trainer (a fraction only where a plant was scaled down)."""
    replica_gpus: int
    """GPUs of one."""
    in_flight: int
    """Responses an engine is given at a time, where there are several engines."""
    shared: bool = False
    """Trainer and engines share the same GPUs and take turns; synchronous loop only."""

    @property
    def rollout_gpus(self) -> int:
        return self.engines * self.engine_gpus

    @property
    def trainer_gpus(self) -> int:
        return round(self.replicas * self.replica_gpus)

    @property
    def gpus(self) -> int:
        return self.trainer_gpus if self.shared else self.rollout_gpus + self.trainer_gpus


@dataclass(frozen=True, slots=True)
class Schedule:
    """The loop's settings, by the config's names; counted in prompt groups."""

    mode: Literal["synchronous", "asynchronous", "constant_lag"]
    groups: int
    """Of one update."""
    size: int
    """Responses in a group."""
    longest: int
    """Tokens at which a response is cut."""
    mini_batches: int = 1
    """Updates in a step."""
    sync_every: int = 1
    """Asynchronous: updates between syncs."""
    max_staleness: int = 0
    """Asynchronous: of a group's oldest token, in updates."""
    too_stale: Literal["wait", "drop", "down_weight"] = "wait"
    """Asynchronous: what becomes of a group that takes too long."""
    max_open: int | None = None
    """Asynchronous: groups asked and not yet taken; None: only the staleness bounds them."""
    old_passes: OldPasses = "one"
    """Old-log-prob passes over a mini-batch: under the weights of now, under those of each version that sampled, none
    (the engine's own log-probs serve)."""
    lag: int = 0
    """Constant lag: in updates."""


def plant_of(config: RunConfig) -> Plant:
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    return Plant(
        engines=config.rollout.engine_count,
        engine_gpus=engine_ranks(config.rollout.engine_args),
        replicas=config.cluster.world_size // replica,
        replica_gpus=replica,
        in_flight=config.rollout.in_flight,
    )


def replica_step(config: RunConfig) -> int:
    """Replicas come in multiples of this: those of one expert-parallel group."""
    parallel = config.parallel
    if parallel.expert == "auto":
        return 1
    ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    replica = parallel.tensor * parallel.pipeline * parallel.context
    return math.lcm(ranks, replica) // replica


def schedule_of(config: RunConfig) -> Schedule:
    asynchronous = config.asynchronous
    schedule = Schedule(
        mode=config.train.mode,
        groups=config.groups_per_update,
        size=config.rollout.samples_per_prompt,
        longest=config.rollout.max_response_tokens,
        mini_batches=config.train.mini_batches,
        old_passes=_old_passes(config),
    )
    if schedule.mode == "constant_lag":
        return replace(schedule, lag=config.constant_lag.lag)
    if schedule.mode == "synchronous":
        return schedule
    return replace(
        schedule,
        sync_every=asynchronous.sync_every,
        max_staleness=asynchronous.max_staleness,
        too_stale=asynchronous.too_stale,
        max_open=asynchronous.max_open,
    )


def _old_passes(config: RunConfig) -> OldPasses:
    if not config.knows_old_policy:
        return "none"
    return "by version" if config.keeps_weights else "one"


def scaled(plant: Plant, schedule: Schedule, rates: Rates, factor: float) -> tuple[Plant, Schedule, Rates]:
    """A plant about ``factor`` times smaller whose every engine and replica does what it did: engines, groups and
    replicas shrink together, by the ratio of the groups, and what the one driver does for each response grows by it."""
    if factor <= 1:
        return plant, schedule, rates
    engines = max(1, round(plant.engines / factor))
    groups = max(1, round(schedule.groups * engines / plant.engines))
    ratio = groups / schedule.groups
    bound = None if schedule.max_open is None else max(groups, round(schedule.max_open * ratio))
    serial = ("reward_response", "step_response")
    return (
        replace(plant, engines=engines, replicas=plant.replicas * ratio),
        replace(schedule, groups=groups, max_open=bound),
        rates.model_copy(update={name: getattr(rates, name) / ratio for name in serial}),
    )
