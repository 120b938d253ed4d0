"""Several engines that look like one, and go on looking so when one of them dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_vespo.rollout import io_loop
from megatron_vespo.rollout.dispatch import Dispatcher, Patience
from megatron_vespo.rollout.jobs import Job, Parts
from megatron_vespo.rollout.occupancy import BusySpan
from megatron_vespo.rollout.protocol import (
    ALL_MEMORY,
    Engine,
    EngineDown,
    EngineError,
    GenerateRequest,
    Generation,
    MemoryPart,
    PauseMode,
)
from megatron_vespo.rollout.restart import Launcher, Restarts, ServedWeights
from megatron_vespo.rollout.seats import Seat

LOOK_EVERY_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks a pool until that is forsaken: for threads that may not have noticed yet. Raises EngineError then."""

    pool: EnginePool
    era: int

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[Generation]]:
        return self.pool.generate(requests, era=self.era)


class EnginePool:
    """Requests go where they would be done first (balance.py); weights and pauses go to all engines.

    An engine that dies or hangs is restarted with the newest weights (restart.py), and what it had is asked for again,
    there or elsewhere: no request is lost, no response returned twice. What cannot be mended is raised as EngineError,
    naming the engine and what was tried: a request that an engine refuses, one that failed too often, an engine that
    does not come back. Repeatable to the bit with the reference engine: with one engine, or where all requests of a
    call fit in flight; otherwise which engine is free first decides, and a response may differ in its last bits.

    Thread-safe: other threads may ask, abort or pause meanwhile.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        launcher: Launcher | None = None,
        weights: ServedWeights | None = None,
        patience: Patience | None = None,
    ) -> None:
        """``launcher``: None where someone else started the engines. ``weights``: what they serve now, if known."""
        if not engines:
            raise ValueError("EnginePool needs at least one engine; set rollout.engines or rollout.urls")
        patience = patience or Patience()
        self.url = ", ".join(engine.url for engine in engines)
        self._threads = ThreadPoolExecutor(2 * len(engines) + 4, thread_name_prefix="rollout-control")
        self._restarts = Restarts(
            launcher, weights, patience.max_restarts, patience.restart_delay_s, self._threads, initial=weights
        )
        self._dispatcher = Dispatcher(engines, patience, self._restarts, self._threads)
        self._refreshing = threading.Lock()
        self.refresh: Callable[[], object] | None = None
        """Gives the newest weights to every engine, the ``stale`` ones too, and admits them. Called by whoever waits
        here for an answer, so it must be harmless then. None: a stale engine waits for the next sync."""

    # --- sampling -----------------------------------------------------------------------------------------------

    def submit(
        self, requests: Sequence[GenerateRequest], parts: Sequence[Parts | None] | None = None
    ) -> list[Future[list[Generation]]]:
        """One future a request, each done when its ``n`` responses are. ``parts``: for each request, where there is
        something of its responses already (:meth:`partials`); they go on from there."""
        return [job.done for job in self._submitted(requests, parts)]

    def generate(self, requests: Sequence[GenerateRequest], *, era: int | None = None) -> list[list[Generation]]:
        """``era``: see :class:`Asker`."""
        jobs = self._submitted(requests, era=era)
        try:
            waiting = {job.done for job in jobs}
            while waiting:
                done, waiting = wait(waiting, timeout=LOOK_EVERY_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises the first error, while others may still be under way
                self.refresh_stale()
            return [job.done.result() for job in jobs]
        except BaseException:
            io_loop.call(self._dispatcher.drop, jobs)
            raise

    def _submitted(
        self,
        requests: Sequence[GenerateRequest],
        parts: Sequence[Parts | None] | None = None,
        era: int | None = None,
    ) -> list[Job]:
        jobs = [Job(*each) for each in zip(requests, parts or [None] * len(requests), strict=True)]
        io_loop.call(self._dispatcher.submit, jobs, era)
        return jobs

    def abort(self, request_id: str | None = None) -> None:
        io_loop.wait_for(self._dispatcher.abort(request_id))

    def partials(self) -> dict[str, Parts]:
        """By id of each request under way: what there is of its responses, to the token. They lose nothing and go on.

        An engine tells a response only once it has ended. So all are aborted, as those that take too long are, their
        parts are kept, and the rest is asked for again, with the parts in the prompt (continuation.py): what it costs
        is to compute their keys once more, where the engine's prefix cache does not have them. To have them streamed
        instead would cost a message for each token of a whole run, for what is asked now and then.
        """
        return io_loop.wait_for(self._dispatcher.surrender())

    def asker(self) -> Asker:
        return Asker(self, io_loop.call(lambda: self._dispatcher.era))

    def forsake(self) -> None:
        """Give up everything that is asked for; the engines go on, and may be asked anew."""
        io_loop.wait_for(self._dispatcher.forsake())

    # --- weights ------------------------------------------------------------------------------------------------

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        """Every engine serves ``version`` before it gets another request: now, or when it has been restarted."""
        weights = ServedWeights(folder, version)
        self.expect(weights)
        self.each(lambda engine: engine.update_weights_from_disk(folder, version))
        io_loop.wait_for(self._rejoin(weights))

    def catch_up(self, weights: ServedWeights) -> None:
        """After someone gave the engines ``weights``: those that were away then, and serve others, load them."""
        self.expect(weights)

        def update(engine: Engine) -> None:
            if engine.weight_version() != weights.version:
                engine.update_weights_from_disk(weights.folder, weights.version)

        self.each(update)
        io_loop.wait_for(self._rejoin(weights))

    def expect(self, weights: ServedWeights | None) -> None:
        """What a restarted engine is to serve from now on, None where that lies in no folder; drops ``proof``, which
        was of the weights before."""

        def set_weights() -> None:
            self._restarts.weights, self._restarts.proof = weights, None
            self._dispatcher.balance.prefixes.forget()

        io_loop.call(set_weights)

    def set_proof(self, proof: Callable[[Engine], object]) -> None:
        """Asked of a restarted engine before it gets a request; raises EngineError where it computes wrongly."""
        self._restarts.proof = proof

    def weight_version(self) -> int:
        """The version all engines serve. Raises EngineError where they differ."""
        versions = dict(self.each(lambda engine: (engine.url, engine.weight_version())))
        if len(set(versions.values())) > 1:
            raise EngineError(f"the engines serve different weight versions: {versions}; update all of them again")
        return next(iter(versions.values()))

    def score(self, sequences: list[np.ndarray]) -> list[list[np.ndarray]]:
        """[engine][sequence] log-probs: what each engine that serves makes of ``sequences``."""
        return self.each(lambda engine: engine.score(sequences))

    @contextmanager
    def updating(self) -> Iterator[None]:
        """While someone else gives the engines weights: no clock runs, and no sign of life is asked for."""

        def count(change: int) -> None:
            for seat in self._dispatcher.seats:
                seat.busy += change

        io_loop.call(count, 1)
        try:
            yield
        finally:
            io_loop.call(count, -1)

    def find_dead(self) -> None:
        """Ask all whether they live, so that who died unnoticed restarts; returns when one can take weights."""
        while True:
            io_loop.wait_for(self._each(lambda engine: engine.weight_version()))
            if self.engines or self.stale:
                return
            io_loop.wait_for(asyncio.sleep(0.2))

    @property
    def stale(self) -> tuple[Engine, ...]:
        """Restarted engines that wait for weights which lie in no folder."""
        return tuple(seat.engine for seat in io_loop.call(self._dispatcher.stale))

    def admit(self, version: int) -> None:
        """Those of ``stale`` that were given ``version`` serve from now on."""

        async def look() -> None:
            for seat in self._dispatcher.stale():
                try:
                    if await self._dispatcher.in_thread(seat.engine.weight_version) == version:
                        self._dispatcher.serve(seat)
                except EngineDown as error:
                    self._dispatcher.down(seat, error)

        io_loop.wait_for(look())

    def refresh_stale(self) -> None:
        """Let whoever streams weights give them to engines that wait for them; in the thread of a caller that waits, so
        that nothing is trained meanwhile. Raises what broke the pool, if something did."""
        if self.refresh is None or not self.stale:
            return
        if self._refreshing.acquire(blocking=False):
            try:
                self.refresh()
            finally:
                self._refreshing.release()

    # --- control ------------------------------------------------------------------------------------------------

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that serve."""
        return tuple(seat.engine for seat in io_loop.call(self._dispatcher.up))

    def each(self, ask: Callable[[Engine], T]) -> list[T]:
        """Ask every engine that serves, side by side, in threads. One that turns out to be down is left out of the
        answer and restarted; where none serves, waits until one does."""
        while True:
            answers = io_loop.wait_for(self._each(ask))
            if answers:
                return answers
            self.refresh_stale()
            io_loop.wait_for(asyncio.sleep(0.2))

    def pause(self, mode: PauseMode = "retract") -> None:
        """New requests wait here until :meth:`resume`; what becomes of running ones is the mode's to say."""
        self._dispatcher.paused = True
        self.each(lambda engine: engine.pause(mode))

    def resume(self) -> None:
        self.each(lambda engine: engine.resume())
        io_loop.call(self._dispatcher.resume)

    def hold(self, parts: frozenset[MemoryPart]) -> None:
        """Every engine keeps only these parts of its memory and takes back what it lacks of them; new requests wait
        here unless it is all. One that is being restarted is waited for: it takes its memory as it starts."""
        whole = parts == ALL_MEMORY
        self._dispatcher.paused = True
        changed: set[Engine] = set()

        def change(engine: Engine) -> None:
            if not whole:
                engine.pause()
            engine.hold(parts)
            if whole:
                engine.resume()
            changed.add(engine)

        def unchanged() -> bool:
            return any(seat.state != "lost" and seat.engine not in changed for seat in self._dispatcher.seats)

        while io_loop.call(unchanged):
            # Not `each`, which waits until one serves: all may be waiting for the weights that are about to come.
            io_loop.wait_for(self._each(change, stale=True))
            io_loop.wait_for(asyncio.sleep(0.05))
        if whole:
            io_loop.call(self._dispatcher.resume)

    def healthy(self) -> bool:
        """All engines serve, and say so."""
        seats = io_loop.call(self._dispatcher.up)
        return len(seats) == len(self._dispatcher.seats) and all(seat.engine.healthy() for seat in seats)

    def take_counts(self) -> dict[str, int]:
        """``engine_restarts`` and ``requests_retried`` since the last call; those that are 0 are left out."""

        def take() -> dict[str, int]:
            counts, self._dispatcher.counts = self._dispatcher.counts, type(self._dispatcher.counts)()
            return dict(counts)

        return io_loop.call(take)

    def take_busy(self) -> list[BusySpan]:
        """When the engines had requests, since the last call."""
        return io_loop.call(self._dispatcher.occupancy.take)

    def close(self) -> None:
        """Give up what is asked for, and restart nothing more; the engines run on."""
        io_loop.call(self._dispatcher.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def shutdown(self) -> None:
        """:meth:`close`, and end the engines that this process started."""
        engines = [seat.engine for seat in self._dispatcher.seats]
        self.close()
        with ThreadPoolExecutor(len(engines)) as threads:
            list(threads.map(lambda engine: engine.shutdown(), engines))

    # --- on the loop --------------------------------------------------------------------------------------------

    async def _each(self, ask: Callable[[Engine], T], *, stale: bool = False) -> list[T]:
        """``stale``: those, too."""

        async def ask_one(seat: Seat) -> list[T]:
            engine = seat.engine
            seat.busy += 1
            try:
                return [await self._dispatcher.in_thread(ask, engine)]
            except EngineDown as error:
                if seat.engine is engine:
                    self._dispatcher.down(seat, error)
                return []
            finally:
                seat.busy -= 1

        seats = [*self._dispatcher.up(), *(self._dispatcher.stale() if stale else [])]
        answers = await asyncio.gather(*(ask_one(seat) for seat in seats))
        return [answer for found in answers for answer in found]

    async def _rejoin(self, weights: ServedWeights) -> None:
        """Someone else's engine that was lost and has come back serves again, now that it has the newest weights."""
        if self._restarts.launcher is not None:
            return
        for seat in self._dispatcher.seats:
            if seat.state == "lost":
                with contextlib.suppress(EngineError):
                    await self._dispatcher.in_thread(
                        seat.engine.update_weights_from_disk, weights.folder, weights.version
                    )
                    if await self._dispatcher.in_thread(seat.engine.weight_version) == weights.version:
                        self._dispatcher.serve(seat)
