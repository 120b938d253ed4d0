"""Engines that decode with continuous batching, and the pool that gives them prompt groups."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_vespo.plan.clock import Clock
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.workload import GroupShape

SAME = 1e-9
"""Decode steps closer than this are one."""


@dataclass(eq=False, slots=True)
class Group:
    """A prompt group on its way from being asked to being trained or dropped."""

    number: int
    """How many were asked before it."""
    shape: GroupShape
    left: int
    """Responses that are not done."""
    in_cache: bool = False
    """Its prompt's keys are computed."""
    tokens_by_version: dict[int, int] = field(default_factory=dict)
    """Response tokens, by the weight version that sampled them."""


class Engine:
    """Every running response gets one token in a decode step. ``progress`` counts steps, so that a response of L tokens
    that joins at p is done at p + L, and between two events nothing has to be computed: with n running and c tokens of
    context a step takes a + b n + k c seconds, and s steps a s + b n s + k (c s + n s^2 / 2)."""

    def __init__(self, clock: Clock, rates: Rates, done: Callable[[Group], None]) -> None:
        self.clock, self.rates, self.done = clock, rates, done
        self.load = 0
        """Responses that it was given and has not finished."""
        self.progress = 0.0
        self.busy_s = 0.0
        """Seconds in which something ran."""
        self.response_steps = 0.0
        """Tokens decoded."""
        self.response_s = 0.0
        """Integral of the running responses over time."""
        self._running: list[tuple[float, int, int, Group]] = []
        self._waiting: deque[tuple[Group, int]] = deque()
        self._context = 0.0
        self._blocked_until = 0.0
        self._paused = False
        self._since = 0.0
        self._joined = 0
        self._stamp = 0
        self._switches: list[float] = []
        """Progress at which each version but the first came."""
        self._versions = [0]

    # --- what is done to it -------------------------------------------------------------------------------------

    def submit(self, group: Group) -> None:
        self.bring_up()
        self.load += len(group.shape.responses)
        self._waiting.extend((group, length) for length in group.shape.responses.tolist())
        self._admit()
        self._schedule()

    def pause(self) -> None:
        self.bring_up()
        self._paused = True
        self._stamp += 1

    def resume(self, version: int) -> None:
        """Under the weights of ``version``; the keys of what goes on are computed anew."""
        self.bring_up()
        self._paused = False
        self._switches.append(self.progress)
        self._versions.append(version)
        self._block(self._context * self.rates.prefill_token)
        self._admit()
        self._schedule()

    def bring_up(self) -> None:
        """Account for the time since the last event."""
        now, running = self.clock.now, len(self._running)
        if running:
            self.response_s += running * (now - self._since)
        if running and not self._paused:
            self.busy_s += now - self._since
            self._move(self._steps_in(now - max(self._since, self._blocked_until)))
        self._since = now

    # --- time ---------------------------------------------------------------------------------------------------

    def _step_s(self) -> float:
        rates = self.rates
        return rates.decode_step + rates.decode_response * len(self._running) + rates.decode_context * self._context

    def _steps_in(self, seconds: float) -> float:
        """The inverse of :meth:`_seconds_of`."""
        if seconds <= 0:
            return 0.0
        first, growth = self._step_s(), self.rates.decode_context * len(self._running)
        root = math.sqrt(first**2 + 2 * growth * seconds)
        return 2 * seconds / (first + root) if first + root else 0.0

    def _seconds_of(self, steps: float) -> float:
        return steps * self._step_s() + self.rates.decode_context * len(self._running) * steps**2 / 2

    def _move(self, steps: float) -> None:
        self.progress += steps
        self.response_steps += steps * len(self._running)
        self._context += steps * len(self._running)

    def _block(self, seconds: float) -> None:
        self._blocked_until = max(self._blocked_until, self.clock.now) + seconds

    def _schedule(self) -> None:
        self._stamp += 1
        if self._running and not self._paused:
            start = max(self.clock.now, self._blocked_until)
            remaining = max(0.0, self._running[0][0] - self.progress)
            self.clock.at(start + self._seconds_of(remaining), self._finish, self._stamp)

    # --- responses ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.rates.max_running and not self._paused:
            group, length = self._waiting.popleft()
            if not group.in_cache:
                group.in_cache = True
                self._block(group.shape.prompt * self.rates.prefill_token)
            self._joined += 1
            heapq.heappush(self._running, (self.progress + length, self._joined, length, group))
            self._context += group.shape.prompt

    def _finish(self, stamp: int) -> None:
        if stamp != self._stamp:
            return  # something joined or paused since
        self.bring_up()
        self._move(self._running[0][0] - self.progress)  # what rounding left
        ended: list[Group] = []
        while self._running and self._running[0][0] <= self.progress + SAME:
            end, _, length, group = heapq.heappop(self._running)
            self._count_tokens(group, end - length, length)
            self._context -= group.shape.prompt + length
            self.load -= 1
            group.left -= 1
            if not group.left:
                ended.append(group)
        if not self._running:
            self._context = 0.0
        self._admit()
        self._schedule()
        for group in ended:
            self.done(group)

    def _count_tokens(self, group: Group, start: float, length: int) -> None:
        """Token i (from 1) was sampled at progress start + i, by the version that had come before."""
        counted, at = 0, bisect_left(self._switches, start)
        for switch in range(at, len(self._switches)):
            before = min(length, math.floor(self._switches[switch] - start + SAME))
            if before > counted:
                self._add(group, self._versions[switch], before - counted)
                counted = before
        if counted < length:
            self._add(group, self._versions[-1], length - counted)

    @staticmethod
    def _add(group: Group, version: int, tokens: int) -> None:
        group.tokens_by_version[version] = group.tokens_by_version.get(version, 0) + tokens


class Pool:
    """Gives a group to the engine with the least to do, while one has room (rollout/balance.py)."""

    def __init__(
        self, clock: Clock, rates: Rates, engines: int, in_flight: int, done: Callable[[Group], None]
    ) -> None:
        self.engines = [Engine(clock, rates, self._ended) for _ in range(engines)]
        self._in_flight = in_flight if engines > 1 else None  # a single engine batches best what it has whole
        self._done = done
        self._waiting: deque[Group] = deque()

    def submit(self, group: Group) -> None:
        self._waiting.append(group)
        self._dispatch()

    def pause(self) -> None:
        for engine in self.engines:
            engine.pause()

    def resume(self, version: int) -> None:
        for engine in self.engines:
            engine.resume(version)

    def bring_up(self) -> None:
        for engine in self.engines:
            engine.bring_up()

    def _ended(self, group: Group) -> None:
        self._done(group)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting:
            engine = min(self.engines, key=_load)
            size = len(self._waiting[0].shape.responses)
            if self._in_flight is not None and engine.load and engine.load + size > self._in_flight:
                return
            engine.submit(self._waiting.popleft())


def _load(engine: Engine) -> int:
    return engine.load
