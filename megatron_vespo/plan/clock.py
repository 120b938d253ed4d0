"""Simulated time: what happens next, and processes that wait for it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator
from typing import Any


class Signal:
    """Something that processes wait for, any number of times."""

    def __init__(self) -> None:
        self.waiting: list[Process] = []


Process = Generator[float | Signal, None, None]
"""Yields seconds to sleep, or a signal to wait for."""


class Clock:
    """Runs actions in order of time; of the same time, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._actions: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        self._asked += 1
        heapq.heappush(self._actions, (time, self._asked, action, arguments))

    def start(self, process: Process) -> None:
        self.at(self.now, self._resume, process)

    def fire(self, signal: Signal) -> None:
        """Whoever waits for it goes on, after what is happening now."""
        waiting, signal.waiting = signal.waiting, []
        for process in waiting:
            self.at(self.now, self._resume, process)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Until the condition holds, or nothing is left to happen."""
        while self._actions and not until():
            time, _, action, arguments = heapq.heappop(self._actions)
            assert time >= self.now and not math.isnan(time), (time, self.now)
            self.now = time
            action(*arguments)

    def _resume(self, process: Process) -> None:
        waits_for = next(process, None)
        if isinstance(waits_for, Signal):
            waits_for.waiting.append(process)
        elif waits_for is not None:
            self.at(self.now + waits_for, self._resume, process)
