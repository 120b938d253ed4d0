"""What the pool keeps of a request from when it is asked for until each of its responses is there, once."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from megatron_vespo.rollout.continuation import continuation, joined
from megatron_vespo.rollout.protocol import EngineError, GenerateRequest, Generation


class Job:
    """One request of the pool's caller. ``done`` gets its ``n`` responses, or the error that kept one from coming."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.done: Future[list[Generation]] = Future()
        self.aborted = False
        """The caller wants what there is."""
        self._parts: list[Generation | None] = [None] * request.n
        self._left = request.n
        self._sent = 0

    def whole(self) -> Piece:
        """All of it, to be asked for at once."""
        return Piece(self, self._named(self.request), 0)

    def again(self, piece: Piece, reason: str) -> Piece:
        """``piece`` once more, nothing of which has come back; under another id, since the old may still be running."""
        return Piece(self, self._named(piece.request), piece.first, (*piece.retries, reason))

    def rest(self, piece: Piece, index: int, engine: int, reason: str) -> Piece:
        """What is left to ask for of response ``index``, which ``piece`` was cut in on ``engine``."""
        part = self._parts[index]
        assert part is not None
        request = self._named(continuation(self.request, index, part, self.request.id))
        return Piece(self, request, index, (*piece.retries, reason), not_on=engine)

    def add(self, piece: Piece, answer: list[Generation], *, cut: bool) -> list[int]:
        """Take what ``piece`` brought; the responses that must go on, where it was ``cut`` rather than done."""
        unfinished = []
        for index, generation in enumerate(answer, start=piece.first):
            before = self._parts[index]
            part = self._parts[index] = generation if before is None else joined(before, generation)
            if cut and not self.aborted and part.finish_reason == "abort":
                unfinished.append(index)
            else:
                part.retries = piece.retries
                self._left -= 1
        self._finish()
        return unfinished

    def give_up(self, piece: Piece) -> None:
        """It was aborted while ``piece`` waited: what there is, is the answer."""
        nothing = Generation(
            np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32), finish_reason="abort"
        )
        for index in range(piece.first, piece.first + piece.request.n):
            part = self._parts[index] = self._parts[index] or replace(nothing)
            part.retries = piece.retries
            self._left -= 1
        self._finish()

    def fail(self, error: BaseException) -> None:
        if not self.done.done() and self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)

    def _finish(self) -> None:
        if self._left == 0 and not self.done.done() and self.done.set_running_or_notify_cancel():
            self.done.set_result([part for part in self._parts if part is not None])

    def _named(self, request: GenerateRequest) -> GenerateRequest:
        self._sent += 1
        name = self.request.id if self._sent == 1 else f"{self.request.id}~{self._sent}"
        return replace(request, id=name)


@dataclass(eq=False, slots=True)
class Piece:
    """A request as an engine is asked for it: responses ``first`` to ``first + request.n - 1`` of a job."""

    job: Job
    request: GenerateRequest
    first: int
    retries: tuple[str, ...] = ()
    not_on: int | None = None
    """The engine that was too slow with it."""

    def too_often(self, limit: int) -> EngineError | None:
        """The error to end with, where it was asked for again more than ``limit`` times."""
        if len(self.retries) <= limit:
            return None
        reasons = "\n  ".join(self.retries)
        return EngineError(
            f"request {self.job.request.id!r} failed {len(self.retries)} times (rollout.request_retries = {limit}):"
            f"\n  {reasons}"
        )
