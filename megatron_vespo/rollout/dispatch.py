"""Takes requests to engines and brings their responses back, whatever happens to an engine meanwhile.

What holds: each response is returned once. A call to an engine brings all of its responses or none; a call that was
given up (its engine died, hung, or did not give back what was aborted) is cancelled before its requests are sent again,
and whatever it might still bring is not looked at.

Everything here runs on the I/O loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import Any

from megatron_vespo.rollout.balance import Balance
from megatron_vespo.rollout.client import calls_of
from megatron_vespo.rollout.health import sign_of_life
from megatron_vespo.rollout.jobs import Job, Parts, Piece
from megatron_vespo.rollout.occupancy import Occupancy
from megatron_vespo.rollout.protocol import Engine, EngineDown, EngineError, Generation
from megatron_vespo.rollout.restart import Restarts
from megatron_vespo.rollout.seats import Call, Seat

logger = logging.getLogger(__name__)

TICK_S = 0.25
PING_EVERY_S = 5.0
ABORT_GRACE_S = 30.0
"""Within it an engine gives back what was aborted, or it hangs."""
SURRENDER_S = 10.0
"""What an engine has not given back by then is left out of :meth:`Dispatcher.surrender`."""
SURRENDER_AGAIN_S = 0.25
"""A call that had not reached its engine when that was told to end everything is ended by the next time."""


@dataclass(frozen=True, slots=True)
class Patience:
    """When the pool acts, and how often; the fields are those of the config's ``rollout`` section."""

    in_flight: int = 512
    request_timeout_s: float = 1800.0
    request_retries: int = 3
    hang_timeout_s: float = 300.0
    max_restarts: int = 3
    restart_delay_s: float = 1.0


class Dispatcher:
    def __init__(self, engines: Sequence[Engine], patience: Patience, restarts: Restarts, threads: Executor) -> None:
        self.seats = [Seat(index, engine) for index, engine in enumerate(engines)]
        self.balance = Balance(len(engines), patience.in_flight)
        self.patience, self.restarts, self.threads = patience, restarts, threads
        self.paused = False
        self.era = 0
        """Counts those who asked, one after the other (:meth:`forsake`)."""
        self.broken: EngineError | None = None
        """Why no request can be answered any more."""
        self.counts: Counter[str] = Counter()
        self.occupancy = Occupancy()
        self._waiting: deque[Piece] = deque()
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking = False
        self._numbers = count()

    # --- asked by the pool --------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job], era: int | None = None) -> None:
        """``era``: raises EngineError where another has begun."""
        if era not in (None, self.era):
            raise EngineError("nobody waits for this response any more: the run that asked for it has ended")
        for job in jobs:
            if job.request.id in self._jobs:
                raise ValueError(f"request id {job.request.id!r} is that of a running request")
        together = next(self._numbers)
        for job in jobs:
            self._jobs[job.request.id] = job
            self._waiting.extend(replace(piece, together=together) for piece in job.pieces())
            self._forget(job)
        self._schedule()

    async def abort(self, request_id: str | None) -> None:
        """End one job, or all, with what they have."""
        jobs = set(self._jobs.values()) if request_id is None else {self._jobs.get(request_id)}
        for job in jobs - {None}:
            assert job is not None
            job.aborted = True
        waiting, self._waiting = self._waiting, deque()
        for piece in waiting:
            if piece.job in jobs:
                piece.job.give_up(piece)
                self._forget(piece.job)
            else:
                self._waiting.append(piece)
        if request_id is None:
            await asyncio.gather(*(self._abort(seat, None) for seat in self.seats if seat.calls))
        else:
            running = [(seat, p) for seat in self.seats for call in seat.calls for p in call.pieces if p.job in jobs]
            await asyncio.gather(*(self._abort(seat, piece.request.id) for seat, piece in running))

    def drop(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more."""
        unwanted = set(jobs)
        self._waiting = deque(piece for piece in self._waiting if piece.job not in unwanted)
        running = [(seat, p) for seat in self.seats for call in seat.calls for p in call.pieces if p.job in unwanted]
        for job in unwanted:
            job.aborted = True
            job.done.cancel()
        for job in unwanted - {piece.job for _, piece in running}:
            self._forget(job)
        for seat, piece in running:
            self._start(self._abort(seat, piece.request.id))

    async def forsake(self) -> None:
        """Nobody waits for anything any more. Afterwards nothing is under way, here or on an engine that answers."""
        self.era += 1
        self._waiting.clear()
        for job in self._jobs.values():
            job.aborted = True
            job.done.cancel()
        await asyncio.gather(*(self._abort(seat, None) for seat in self.seats if seat.calls))
        for seat in self.seats:
            for call in list(seat.calls):
                self._end(seat, call)
        self._jobs.clear()

    async def surrender(self) -> dict[str, Parts]:
        """By request: what there is of its responses under way. They are cut for it and go on in other calls, of which
        the cut is no failure."""
        loop = asyncio.get_running_loop()
        running = [(seat, call) for seat in self.seats for call in seat.calls]
        for _, call in running:
            call.surrendered = True
        # Nothing is sent meanwhile, so that an engine may be told to end all that it has: one message, however many.
        before, self.paused = self.paused, True
        deadline = loop.time() + SURRENDER_S
        try:
            while loop.time() < deadline and (seats := {seat.index for seat, call in running if call in seat.calls}):
                await asyncio.gather(*(self._abort(self.seats[index], None) for index in seats))
                left = [call.task for seat, call in running if call in seat.calls and call.task is not None]
                if left:
                    await asyncio.wait(left, timeout=SURRENDER_AGAIN_S)
        finally:
            self.paused = before
            self._schedule()
        return {name: job.parts for name, job in self._jobs.items() if not job.aborted}

    def resume(self) -> None:
        self.paused = False
        self._schedule()

    def up(self) -> list[Seat]:
        """Those that serve. Raises what broke the pool, if something did."""
        return self._seats("up")

    def stale(self) -> list[Seat]:
        """Those that would, with the newest weights. Raises as :meth:`up` does."""
        return self._seats("stale")

    def serve(self, seat: Seat) -> None:
        """It has the newest weights."""
        seat.state = "up"
        self._schedule()

    def _seats(self, state: str) -> list[Seat]:
        if self.broken is not None:
            raise self.broken
        return [seat for seat in self.seats if seat.state == state]

    def down(self, seat: Seat, error: EngineDown) -> None:
        """The engine in ``seat`` died or hangs: what it had goes back in front of the queue, and it is restarted."""
        if seat.state not in ("up", "stale"):
            return
        seat.state = "restarting"
        self.balance.prefixes.forget(seat.index)
        lost = [piece for call in list(seat.calls) for piece in self._end(seat, call)]
        self._again(lost, str(error))
        self._start(self._restart(seat, str(error)))
        self._schedule()

    def close(self) -> None:
        """Stop everything; whoever still waits gets an error."""
        self._break(EngineError("the engine pool has been closed"))
        for task in self._tasks:
            task.cancel()

    # --- sending ------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Give waiting pieces, in their order, to engines with room; what goes to one engine at once shares calls."""
        if self.broken is not None:
            self._break(self.broken)
        up = [seat.index for seat in self.seats if seat.state == "up" and not self.paused]
        shares: dict[int, list[tuple[Piece, int]]] = {}
        while self._waiting:
            piece = self._waiting[0]
            others = [index for index in up if index != piece.not_on]
            index = self.balance.choose(piece.request, others or up)
            if index is None:
                break
            shares.setdefault(index, []).append((self._waiting.popleft(), self.balance.begin(index, piece.request)))
        for index, share in shares.items():
            for _, together in groupby(share, lambda item: item[0].together):
                for items in calls_of(list(together), lambda item: item[0].request):
                    pieces, work = [piece for piece, _ in items], [work for _, work in items]
                    self._send(self.seats[index], Call(pieces, work, self._timeout, next(self._numbers)))

    @property
    def _timeout(self) -> float:
        return self.patience.request_timeout_s

    def _send(self, seat: Seat, call: Call) -> None:
        seat.calls.append(call)
        self.occupancy.busy(seat.index)
        call.task = self._start(self._ask(seat, call))
        if seat.watch is None or seat.watch.done():
            seat.watch = self._start(self._watch(seat))
        if not self._ticking:
            self._ticking = True
            self._start(self._tick())

    async def _ask(self, seat: Seat, call: Call) -> None:
        try:
            answers = await seat.engine.answer([piece.request for piece in call.pieces])
        except EngineDown as error:
            if call in seat.calls:
                self.down(seat, error)
            return
        except Exception as error:
            # It refused; or our own fault, which must not be lost in a task either.
            for piece in self._end(seat, call):
                piece.job.fail(error)
                self._forget(piece.job)
        else:
            self.restarts.in_a_row[seat.index] = 0
            pairs = zip(self._end(seat, call), answers, strict=True)
            rest = [left for pair in pairs for left in self._take(seat, call, *pair)]
            if call.cut:
                self._requeue(rest)
            else:
                self._waiting.extendleft(reversed(rest))
        self._schedule()

    def _take(self, seat: Seat, call: Call, piece: Piece, answer: list[Generation]) -> list[Piece]:
        """What is left to ask for where the call was cut."""
        self.balance.computed(seat.index, piece.request, [generation.tokens for generation in answer])
        late = f"{seat.engine.url}: not done within {self._timeout:g} s (rollout.request_timeout_s)"
        not_on = (seat.index, late) if call.cut else None
        unfinished = piece.job.add(piece, answer, cut=call.cut or call.surrendered)
        self._forget(piece.job)
        return [replace(piece.job.rest(piece, i, not_on), together=call.number) for i in unfinished]

    def _end(self, seat: Seat, call: Call) -> list[Piece]:
        """The call is over, answered or given up; returns its pieces."""
        seat.calls.remove(call)
        if not seat.calls:
            self.occupancy.idle(seat.index)
        for piece, work in zip(call.pieces, call.work, strict=True):
            self.balance.end(seat.index, piece.request, work)
        if call.task is not None and call.task is not asyncio.current_task():
            call.task.cancel()
        return call.pieces

    def _again(self, pieces: Sequence[Piece], reason: str) -> None:
        first_line = reason.partition("\n")[0]
        aborted = [piece for piece in pieces if piece.job.aborted]
        for piece in aborted:
            piece.job.give_up(piece)
            self._forget(piece.job)
        self._requeue([piece.job.again(piece, first_line) for piece in pieces if not piece.job.aborted])

    def _requeue(self, pieces: Sequence[Piece]) -> None:
        for piece in reversed(pieces):
            error = piece.too_often(self.patience.request_retries)
            if error is not None:
                piece.job.fail(error)
                self._forget(piece.job)
            elif not piece.job.done.done():
                self.counts["requests_retried"] += 1
                self._waiting.appendleft(piece)

    def _forget(self, job: Job) -> None:
        if job.done.done() and self._jobs.get(job.request.id) is job:
            del self._jobs[job.request.id]

    # --- watching -----------------------------------------------------------------------------------------------

    async def _watch(self, seat: Seat) -> None:
        """While it has work, see that it lives."""
        while seat.calls and seat.state == "up":
            await asyncio.sleep(PING_EVERY_S)
            if not seat.calls or seat.busy:
                continue
            try:
                await sign_of_life(seat.engine, self.patience.hang_timeout_s)
            except EngineDown as error:
                if not seat.busy:
                    self.down(seat, error)

    async def _tick(self) -> None:
        """Cut calls that take too long; the clock stands still in a pause and while weights are loaded."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while any(seat.calls for seat in self.seats):
            await asyncio.sleep(TICK_S)
            before, now = now, loop.time()
            for seat in self.seats:
                if not self.paused and not seat.busy:
                    for call in list(seat.calls):
                        self._age(seat, call, now - before)
        self._ticking = False

    def _age(self, seat: Seat, call: Call, seconds: float) -> None:
        call.left_s -= seconds
        if call.left_s > 0 or call not in seat.calls:
            return
        names = f"{call.pieces[0].request.id!r}" + (f" and {len(call.pieces) - 1} more" if call.pieces[1:] else "")
        if not call.cut:
            call.cut = True
            logger.warning("%s: request %s is cut after %g s", seat.engine.url, names, self._timeout)
            for piece in call.pieces:
                self._start(self._abort(seat, piece.request.id))
        elif call.left_s < -ABORT_GRACE_S:
            self.down(
                seat,
                EngineDown(
                    f"{seat.engine.url} hangs: request {names} was aborted after {self._timeout:g} s and did not end "
                    f"within {ABORT_GRACE_S:g} s more"
                ),
            )

    async def _abort(self, seat: Seat, request_id: str | None) -> None:
        # An engine that cannot be told is one whose death or hanging is noticed elsewhere.
        with contextlib.suppress(EngineError):
            await self.in_thread(seat.engine.abort, request_id)

    # --- restarting ---------------------------------------------------------------------------------------------

    async def _restart(self, seat: Seat, reason: str) -> None:
        try:
            engine = await self.restarts.restarted(seat.index, seat.engine, reason)
        except EngineError as error:
            seat.state = "lost"
            others = [other for other in self.seats if other.state != "lost"]
            if self.restarts.launcher is None and others:
                logger.warning("engine %d: %s; %d are left", seat.index, error, len(others))
            elif self.restarts.launcher is None and len(self.seats) > 1:
                self._break(EngineError(f"none of the {len(self.seats)} engines is left, the last: {error}"))
            else:
                self._break(error)
        except Exception as error:
            self._break(EngineError(f"engine {seat.index}: {error!r} while it was restarted, after: {reason}"))
        else:
            self.counts["engine_restarts"] += 1
            seat.engine, seat.state = engine, "stale" if self.restarts.weights is None else "up"
        self._schedule()

    def _break(self, error: EngineError) -> None:
        self.broken = self.broken or error
        self._waiting.clear()
        for job in list(self._jobs.values()):
            job.fail(self.broken)
        self._jobs.clear()
        for seat in self.seats:
            for call in list(seat.calls):
                self._end(seat, call)

    # --- tasks --------------------------------------------------------------------------------------------------

    async def in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
