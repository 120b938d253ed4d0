"""An engine's place in the pool, and the calls that it has under way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from megatron_vespo.rollout.jobs import Piece
from megatron_vespo.rollout.protocol import Engine


@dataclass(eq=False, slots=True)
class Call:
    """One HTTP call under way."""

    pieces: list[Piece]
    work: list[int]
    left_s: float
    """Until it is cut."""
    number: int
    """What is left of its responses where it is cut shares a call again, with each other."""
    cut: bool = False
    """It takes too long."""
    surrendered: bool = False
    """Somebody wanted to see what there is of it; it goes on in another call."""
    task: asyncio.Task[None] | None = None


@dataclass(eq=False, slots=True)
class Seat:
    """An engine's place in the pool; the engine in it may be replaced."""

    index: int
    engine: Engine
    state: Literal["up", "restarting", "stale", "lost"] = "up"
    """stale: it runs again, and gets no request before it has been given the newest weights."""
    calls: list[Call] = field(default_factory=list)
    busy: int = 0
    """Control calls under way, which have a time limit of their own: loading weights, it gives no sign of life."""
    watch: asyncio.Task[None] | None = None
