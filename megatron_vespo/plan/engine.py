"""Engines that decode with continuous batching."""

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
    served: int = 0
    """The version that engines served when it was asked: none of its tokens is older."""
    left: int = 0
    """Responses that are not done."""
    cut: bool = False
    """It was aborted, and is not whole."""
    in_cache: bool = False
    """Its prompt's keys are computed."""
    call: Call | None = None
    tokens: dict[int, int] = field(default_factory=dict)
    """Response tokens, by the weight version that sampled them."""
    passed: dict[int, int] = field(default_factory=dict)
    """By version, tokens of the responses, prompts included, that have a token of that version."""

    @property
    def oldest(self) -> int | None:
        return min(self.tokens, default=None)


@dataclass(eq=False, slots=True)
class Call:
    """Groups that are sent together and come back together, when the last is done."""

    groups: list[Group]
    left: int
    """Groups that are not done."""

    @property
    def responses(self) -> int:
        return sum(len(group.shape.responses) for group in self.groups)


class Engine:
    """Every running response gets one token in a decode step. ``progress`` counts steps, so that a response of L tokens
    that joins at p is done at p + L, and between two events nothing has to be computed: with n running and c tokens of
    context a step takes a + b n + k c seconds, and s steps a s + b n s + k (c s + n s^2 / 2)."""

    def __init__(self, clock: Clock, rates: Rates, done: Callable[[list[Group]], None]) -> None:
        self.clock, self.rates, self.done = clock, rates, done
        self.load = 0
        """Responses in its calls: what the pool counts."""
        self.progress = 0.0
        self.busy_s = 0.0
        """Seconds in which it had a call, paused or not."""
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
        self._calls = 0
        self._switches: list[float] = []
        """Progress at which each version but the first came."""
        self._versions = [0]

    # --- what is done to it -------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """``load`` counts it already."""
        self.bring_up()
        self._calls += 1
        for group in call.groups:
            group.call, group.left, group.in_cache, group.cut = call, len(group.shape.responses), False, False
            self._waiting.extend((group, length) for length in group.shape.responses.tolist())
        self._admit()
        self._schedule()

    def abort(self, group: Group) -> None:
        """End its responses with what they have."""
        self.bring_up()
        group.cut = True
        for end, _, length, _ in [entry for entry in self._running if entry[3] is group]:
            start = end - length
            decoded = min(length, math.floor(self.progress - start + SAME))
            self._count_tokens(group, start, decoded)
            self._context -= group.shape.prompt + self.progress - start
        self._running = [entry for entry in self._running if entry[3] is not group]
        heapq.heapify(self._running)
        self._waiting = deque(item for item in self._waiting if item[0] is not group)
        group.left = 0
        self._admit()
        self._schedule()
        self._end([group])

    def has(self, group: Group) -> bool:
        return group.left > 0 and (
            any(entry[3] is group for entry in self._running) or any(item[0] is group for item in self._waiting)
        )

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
        if self._calls:
            self.busy_s += now - self._since
        if running and not self._paused:
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
            group.left -= 1
            if not group.left:
                ended.append(group)
        if not self._running:
            self._context = 0.0
        self._admit()
        self._schedule()
        self._end(ended)

    def _end(self, groups: list[Group]) -> None:
        for group in groups:
            call = group.call
            assert call is not None
            call.left -= 1
            if not call.left:
                self._calls -= 1
                self.load -= call.responses
                self.done(call.groups)

    def _count_tokens(self, group: Group, start: float, length: int) -> None:
        """Token i (from 1) was sampled at progress start + i, by the version that had come before."""
        counted = 0
        for switch in range(bisect_left(self._switches, start), len(self._switches)):
            before = min(length, math.floor(self._switches[switch] - start + SAME))
            self._add(group, self._versions[switch], before - counted, length)
            counted = max(counted, before)
        self._add(group, self._versions[-1], length - counted, length)

    @staticmethod
    def _add(group: Group, version: int, tokens: int, length: int) -> None:
        if tokens > 0:
            group.tokens[version] = group.tokens.get(version, 0) + tokens
            group.passed[version] = group.passed.get(version, 0) + group.shape.prompt + length
