"""Which engine gets a request: the one that would be done first, counting what it need not compute again.

Decided when a request can start, not when it is asked for. An engine is given at most ``in_flight`` responses at a
time; the rest wait here, for whichever engine has room first, so that a slow engine holds up its own share only.

Work is counted in tokens: a response costs what it may grow to, a prompt what the engine has not computed before. The
choice is the engine with the least work in flight, this request's own uncached prompt included. So an engine that holds
the prompt's beginning (a group's other responses, the turns before, the first part of a cut response, a system prompt
that many share) is preferred exactly as long as it is not further behind than computing that beginning would take.
Counting a prompt's token like a response's overrates the prompt: then a request follows its prefix a little too far,
by the prompt's length at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.rollout.protocol import GenerateRequest

BLOCK = 32
"""Tokens in a block of a prefix; shorter prefixes are not worth a thought."""
CAPACITY = 200_000
"""Blocks remembered, over all engines; the oldest are forgotten first."""


@dataclass(slots=True)
class Load:
    """What one engine has in flight."""

    tokens: int = 0
    responses: int = 0


class Prefixes:
    """What each engine's prefix cache probably holds: everything it computed since its cache was last flushed."""

    def __init__(self) -> None:
        self._engines: dict[int, set[int]] = {}

    def add(self, engine: int, tokens: np.ndarray) -> None:
        for block in _blocks(tokens):
            # Taken out and put in again, it is the youngest.
            holders = self._engines.pop(block, set())
            holders.add(engine)
            self._engines[block] = holders
        while len(self._engines) > CAPACITY:
            del self._engines[next(iter(self._engines))]

    def held(self, tokens: np.ndarray) -> dict[int, int]:
        """Tokens of this prompt that an engine holds, for those that hold any."""
        found: dict[int, int] = {}
        holding: set[int] | None = None
        for count, block in enumerate(_blocks(tokens), start=1):
            holders = self._engines.get(block, set())
            holding = set(holders) if holding is None else holding & holders
            if not holding:
                break
            found.update(dict.fromkeys(holding, count * BLOCK))
        return found

    def forget(self, engine: int | None = None) -> None:
        """An engine's cache is gone, or that of all."""
        if engine is None:
            self._engines.clear()
            return
        for holders in self._engines.values():
            holders.discard(engine)


class Balance:
    """The loads of all engines and the choice among them."""

    def __init__(self, engines: int, in_flight: int) -> None:
        self.loads = [Load() for _ in range(engines)]
        self.prefixes = Prefixes()
        # A single engine batches best what it has whole, and nobody else could take the rest.
        self._in_flight = in_flight if engines > 1 else None

    def choose(self, request: GenerateRequest, engines: Iterable[int]) -> int | None:
        """One of ``engines`` that has room; None: none has. An idle engine has room for any group."""
        able = [engine for engine in engines if self._has_room(self.loads[engine], request.n)]
        if not able:
            return None
        if len(able) == 1:
            return able[0]
        held = self.prefixes.held(request.prompt_tokens)
        return min(able, key=lambda engine: self.loads[engine].tokens - held.get(engine, 0))

    def begin(self, engine: int, request: GenerateRequest) -> int:
        """Count the request to the engine; returns its work in tokens, for :meth:`end`."""
        cached = self.prefixes.held(request.prompt_tokens).get(engine, 0)
        work = request.n * request.sampling.max_tokens + len(request.prompt_tokens) - cached
        self.loads[engine].tokens += work
        self.loads[engine].responses += request.n
        self.prefixes.add(engine, request.prompt_tokens)
        return work

    def end(self, engine: int, request: GenerateRequest, work: int) -> None:
        self.loads[engine].tokens -= work
        self.loads[engine].responses -= request.n

    def computed(self, engine: int, request: GenerateRequest, responses: Sequence[np.ndarray]) -> None:
        """The engine holds prompt and responses now: a next turn, or the rest of a cut response, would begin there."""
        for response in responses:
            self.prefixes.add(engine, np.concatenate([request.prompt_tokens, response]))

    def _has_room(self, load: Load, responses: int) -> bool:
        return self._in_flight is None or not load.responses or load.responses + responses <= self._in_flight


def _blocks(tokens: np.ndarray) -> Iterable[int]:
    """A number for each whole block that stands for it and all before it."""
    whole = np.ascontiguousarray(tokens, np.int32)
    before = 0
    for start in range(0, len(whole) - BLOCK + 1, BLOCK):
        before = hash((before, whole[start : start + BLOCK].tobytes()))
        yield before
