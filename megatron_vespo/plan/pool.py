"""Which engine gets a prompt group, and which groups share a call (rollout/balance.py, rollout/client.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from megatron_vespo.plan.clock import Clock
from megatron_vespo.plan.engine import Call, Engine, Group
from megatron_vespo.plan.rates import Rates

CALL_TOKENS = 65_536
"""What the responses of one call may grow to, as in rollout/client.py."""


class Pool:
    """A group waits here until an engine has room for it, and goes to the one with the fewest responses."""

    def __init__(
        self,
        clock: Clock,
        rates: Rates,
        *,
        engines: int,
        in_flight: int,
        longest: int,
        done: Callable[[list[Group]], None],
    ) -> None:
        """longest: tokens at which a response is cut. done: gets the groups of a call that came back."""
        self.engines = [Engine(clock, rates, self._ended) for _ in range(engines)]
        self._in_flight = in_flight if engines > 1 else None  # a single engine batches best what it has whole
        self._longest = longest
        self._done = done
        self._waiting: deque[Group] = deque()

    def submit(self, groups: Sequence[Group]) -> None:
        self._waiting.extend(groups)
        self._dispatch()

    def abort(self, group: Group) -> None:
        """One that waits here has no token, and goes on waiting."""
        for engine in self.engines:
            if engine.has(group):
                engine.abort(group)

    def pause(self) -> None:
        for engine in self.engines:
            engine.pause()

    def resume(self, version: int) -> None:
        for engine in self.engines:
            engine.resume(version)

    def bring_up(self) -> None:
        for engine in self.engines:
            engine.bring_up()

    def _ended(self, groups: list[Group]) -> None:
        self._done(groups)
        self._dispatch()

    def _dispatch(self) -> None:
        shares: dict[int, list[Group]] = {}
        while self._waiting:
            index = self._least()
            engine, size = self.engines[index], len(self._waiting[0].shape.responses)
            if self._in_flight is not None and engine.load and engine.load + size > self._in_flight:
                break  # none has room: all groups are of one size
            engine.load += size
            shares.setdefault(index, []).append(self._waiting.popleft())
        for index, share in shares.items():
            for groups in self._calls_of(share):
                self.engines[index].submit(Call(groups, left=len(groups)))

    def _least(self) -> int:
        return min(range(len(self.engines)), key=lambda index: self.engines[index].load)

    def _calls_of(self, groups: list[Group]) -> Iterator[list[Group]]:
        wanted = len(groups[0].shape.responses) * self._longest
        size = max(1, CALL_TOKENS // wanted)
        for first in range(0, len(groups), size):
            yield groups[first : first + size]
