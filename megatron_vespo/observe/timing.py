"""Where a step's time goes: named phases with their start and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of one phase; ``start`` and ``end`` are Unix seconds."""

    phase: str
    start: float
    end: float


class PhaseTimer:
    """``with timer.phase("rollout"): ...`` any number of times, from any thread; then :meth:`take`.

    Phases of one thread do not nest (RuntimeError), so that a step's seconds by phase add up to the step's time.
    Phases of different threads may overlap, as rollout and training do in an asynchronous run.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = getattr(self._thread, "phase", None)
        if outer is not None:
            raise RuntimeError(f"phase {name!r} was begun inside phase {outer!r}; end that one first")
        self._thread.phase = name
        # The wall clock places a span on the timeline; the monotonic clock measures it, whatever NTP does meanwhile.
        start, started = time.time(), time.perf_counter()
        try:
            yield
        finally:
            self._thread.phase = None
            span = Span(name, start, start + time.perf_counter() - started)
            with self._lock:
                self._spans.append(span)

    def take(self) -> list[Span]:
        """The spans ended since the last call, in order of their end."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans


def seconds_by_phase(spans: list[Span]) -> dict[str, float]:
    """The record's ``seconds``: phases in order of first appearance."""
    seconds: dict[str, float] = {}
    for span in sorted(spans, key=lambda span: span.start):
        seconds[span.phase] = seconds.get(span.phase, 0.0) + span.end - span.start
    return seconds


def timeline(spans: Iterable[tuple[str, Span]]) -> list[list[Any]]:
    """The record's ``timeline``: [lane, phase, start, end] of each (lane, span), to the millisecond."""
    return [[lane, span.phase, round(span.start, 3), round(span.end, 3)] for lane, span in spans]
