"""Trainer and engines on the same devices, one of them at a time in memory; or apart, where nobody has to wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from megatron_vespo.cluster.engine_group import EngineGroup, SharedSeat
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.config.engine_flags import engine_ranks
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.rollout.pool import EnginePool
from megatron_vespo.rollout.protocol import ALL_MEMORY

Turn = Literal["trainer", "hand_over", "engines"]


class Turns(Protocol):
    """Whose turn it is. Each call returns when those named have their memory; to call it again costs nothing."""

    def trainer(self) -> None:
        """The trainer has weights, gradients and optimizer state; engines have nothing, and requests wait."""

    def hand_over(self) -> None:
        """Trainer and engines have their weights, and nothing beside them: what a weight sync needs."""

    def engines(self) -> None:
        """Engines have weights and KV cache; the trainer has nothing."""

    def take(self) -> dict[str, float]:
        """Metrics of the turns since the last call."""


class Apart:
    """Each on devices of its own: it is everybody's turn."""

    def trainer(self) -> None: ...

    def hand_over(self) -> None: ...

    def engines(self) -> None: ...

    def take(self) -> dict[str, float]:
        return {}


class OnSharedDevices:
    """Whoever gives memory up does so before anyone takes any."""

    def __init__(self, trainers: TrainerGroup, pool: EnginePool) -> None:
        """Engines have just been launched, and the trainer holds nothing."""
        self._trainers, self._pool = trainers, pool
        self._now: Turn = "engines"
        self._count, self._seconds, self._bytes = 0, 0.0, 0

    def trainer(self) -> None:
        self._change("trainer", lambda: self._engines_hold(frozenset()), lambda: self._trainers.hold("everything"))

    def engines(self) -> None:
        self._change("engines", lambda: self._trainers.hold("nothing"), lambda: self._engines_hold(ALL_MEMORY))

    def hand_over(self) -> None:
        trainers, engines = lambda: self._trainers.hold("weights"), lambda: self._engines_hold(frozenset({"weights"}))
        self._change("hand_over", *((trainers, engines) if self._now == "trainer" else (engines, trainers)))

    def take(self) -> dict[str, float]:
        found = {"turns": self._count, "turn_seconds": self._seconds, "turn_bytes": self._bytes}
        self._count, self._seconds, self._bytes = 0, 0.0, 0
        return found

    def _engines_hold(self, parts: frozenset) -> int:
        self._pool.hold(parts)
        return 0

    def _change(self, turn: Turn, first: Callable[[], int], then: Callable[[], int]) -> None:
        if turn == self._now:
            return
        start = time.perf_counter()
        self._bytes += first() + then()
        self._now = turn
        self._count += 1
        self._seconds += time.perf_counter() - start


def start_beside(config: RunConfig) -> bool:
    """Whether engines can start before the trainer has: they need neither its memory nor to know its devices."""
    return not config.cluster.colocate and config.sync.transport != "ipc"


def launch_engines(config: RunConfig, trainers: TrainerGroup, logs: Path) -> tuple[EngineGroup, Turns]:
    """The engines of a run, beside its trainer or on its devices (``cluster.colocate``)."""
    sender = trainers.devices()[0] if config.sync.transport == "ipc" else []
    if not config.cluster.colocate:
        return EngineGroup(config, logs, visible=sender), Apart()
    # An engine sizes its KV cache by what is free when it starts.
    trainers.hold("nothing")
    engines = EngineGroup(config, logs, visible=sender, seats=shared_seats(config, trainers))
    return engines, OnSharedDevices(trainers, engines.pool)


def shared_seats(config: RunConfig, trainers: TrainerGroup) -> list[SharedSeat]:
    """One an engine: as many ranks' devices as it has processes, all of one node (the preflight has checked it)."""
    size = engine_ranks(config.rollout.engine_args)
    devices = trainers.devices()
    seats = []
    for index in range(config.rollout.engines):
        ranks = range(index * size, (index + 1) * size)
        bundle = ranks.start // config.cluster.ranks_per_node
        seats.append(SharedSeat(trainers.placement, bundle, tuple(d for rank in ranks for d in devices[rank])))
    return seats
