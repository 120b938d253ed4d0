"""How an engine that died or hangs comes back: started again with the newest weights, and proven.

The new process is launched from the newest published folder, at its version, and gets no request before it says that
version, and before ``proof`` (the run's log-prob probe) has passed where one is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_vespo.rollout.protocol import Engine, EngineError

logger = logging.getLogger(__name__)

LONGEST_DELAY_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """An HF-format folder and the version of the weights in it."""

    folder: Path
    version: int


class Launcher(Protocol):
    """Whoever started the engines and can do it again; both calls come from threads."""

    def relaunch(self, index: int, weights: ServedWeights) -> Engine:
        """End what is left of engine ``index`` and start it again with these weights; returns when it is ready.
        Raises EngineError."""

    def post_mortem(self, index: int) -> str:
        """What engine ``index`` said last, for an error message."""


@dataclass
class Restarts:
    """Of all engines of a pool."""

    launcher: Launcher | None
    """None: someone else started the engines."""
    weights: ServedWeights | None
    """What every engine is to serve. None: it lies in no folder; an engine is launched from ``initial``, and is to be
    given it by whoever streams weights."""
    limit: int
    delay_s: float
    threads: Executor
    initial: ServedWeights | None = None
    """What the engines were launched from at first."""
    proof: Callable[[Engine], object] | None = None
    """Raises EngineError where an engine does not compute what it should under ``weights``."""
    in_a_row: Counter[int] = field(default_factory=Counter)
    """Restarts of each engine since it last answered a request."""

    async def restarted(self, index: int, engine: Engine, reason: str) -> Engine:
        """The engine, running again. Raises EngineError with ``reason`` and all that was tried."""
        if self.launcher is None:
            raise EngineError(f"{reason}\nIt was started by someone else (rollout.urls) and is not restarted.")
        reason = f"{reason}\n{await self._in_thread(self.launcher.post_mortem, index)}"
        if self.limit == 0:
            raise EngineError(reason)
        with contextlib.suppress(EngineError):  # whatever is left of it
            await self._in_thread(engine.shutdown)
        tried: list[str] = []
        while self.in_a_row[index] < self.limit:
            self.in_a_row[index] += 1
            if self.in_a_row[index] > 1:
                await asyncio.sleep(min(self.delay_s * 2 ** (self.in_a_row[index] - 2), LONGEST_DELAY_S))
            attempt = f"restart {self.in_a_row[index]} of {self.limit}"
            logger.warning("engine %d is down, %s: %s", index, attempt, reason)
            try:
                started = await self._launched(index)
            except EngineError as error:
                logger.warning("engine %d: %s failed: %s", index, attempt, error)
                tried.append(f"{attempt}: {error}")
                continue
            version = "of the next sync" if self.weights is None else self.weights.version
            logger.warning("engine %d runs again at %s, weight version %s", index, started.url, version)
            return started
        raise EngineError(
            f"engine {index} is lost after {self.in_a_row[index]} restarts in a row (rollout.max_restarts): "
            + "\n".join([reason, *tried])
        )

    async def _launched(self, index: int) -> Engine:
        """Launched and brought to ``weights``, which may move on meanwhile."""
        weights = self.weights or self.initial
        assert self.launcher is not None and weights is not None
        engine = await self._in_thread(self.launcher.relaunch, index, weights)
        while True:
            version = await self._in_thread(engine.weight_version)
            if version != weights.version:
                raise EngineError(f"{engine.url} says weight version {version}, and was given {weights.version}")
            if self.weights is None:
                return engine
            if self.proof is not None:
                await self._in_thread(self.proof, engine)
            if weights == self.weights:
                return engine
            weights = self.weights
            await self._in_thread(engine.update_weights_from_disk, weights.folder, weights.version)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)
