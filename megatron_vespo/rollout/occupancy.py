"""When each engine had something to sample: the other half of a run's timeline, beside the trainer's phases."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BusySpan:
    """One stretch in which an engine had a request; ``start`` and ``end`` are Unix seconds."""

    engine: int
    start: float
    end: float


class Occupancy:
    """Of all engines of a pool. A sync counts as busy: requests stand still in it, they are not absent."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._since: dict[int, float] = {}
        self._spans: list[BusySpan] = []

    def busy(self, engine: int) -> None:
        self._since.setdefault(engine, self._clock())

    def idle(self, engine: int) -> None:
        start = self._since.pop(engine, None)
        if start is not None:
            self._spans.append(BusySpan(engine, start, self._clock()))

    def take(self) -> list[BusySpan]:
        """Those since the last call; one that lasts is cut here, and its rest is in the next call's."""
        for engine in list(self._since):
            self.idle(engine)
            self.busy(engine)
        spans, self._spans = self._spans, []
        return sorted(spans, key=lambda span: (span.engine, span.start))
