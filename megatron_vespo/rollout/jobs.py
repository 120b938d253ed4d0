"""What the pool keeps of a request from when it is asked for until each of its responses is there, once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from megatron_vespo.rollout.continuation import continuation, joined
from megatron_vespo.rollout.protocol import EngineError, GenerateRequest, Generation
from megatron_vespo.samples.records import FinishReason

Parts = list[Generation | None]
"""What there is of a request's responses, by their places in it: None where nothing is; finish_reason ``abort`` where
it is to go on."""


class Job:
    """One request of the pool's caller. ``done`` gets its ``n`` responses, or the error that kept one from coming."""

    def __init__(self, request: GenerateRequest, parts: Sequence[Generation | None] | None = None) -> None:
        """``parts``: what there is of its responses already."""
        self.request = request
        self.done: Future[list[Generation]] = Future()
        self.aborted = False
        """The caller wants what there is."""
        self._parts: Parts = [None] * request.n if parts is None else list(parts)
        self._left = sum(not _is_whole(part) for part in self._parts)
        self._sent = 0

    def pieces(self) -> list[Piece]:
        """What is to be asked for: all of it at once, or of each response what is left."""
        if not any(self._parts):
            return [Piece(self, self._named(self.request), 0)]
        self._finish()
        return [self._rest(i) for i, part in enumerate(self._parts) if not _is_whole(part)]

    @property
    def parts(self) -> Parts:
        """What there is of its responses, as far as calls that have ended brought it."""
        return list(self._parts)

    def again(self, piece: Piece, reason: str) -> Piece:
        """``piece`` once more, nothing of which has come back; under another id, since the old may still be running."""
        return replace(piece, request=self._named(piece.request), retries=(*piece.retries, reason), not_on=None)

    def rest(self, piece: Piece, index: int, not_on: tuple[int, str] | None) -> Piece:
        """What is left to ask for of response ``index``, which ``piece`` was cut in. ``not_on``: where it was too slow:
        (the engine, what to say of it)."""
        rest = self._rest(index)
        rest.retries = piece.retries
        if not_on is not None:
            rest.not_on, rest.retries = not_on[0], (*piece.retries, not_on[1])
        return rest

    def _rest(self, index: int) -> Piece:
        part = self._parts[index] or replace(NOTHING)
        return Piece(self, self._named(continuation(self.request, index, part, self.request.id)), index)

    def add(self, piece: Piece, answer: list[Generation], *, cut: bool) -> list[int]:
        """Take what ``piece`` brought; the responses that must go on, where it was ``cut`` rather than done."""
        unfinished = []
        for index, generation in enumerate(answer, start=piece.first):
            before = self._parts[index]
            part = self._parts[index] = generation if before is None else joined(before, generation)
            if cut and not self.aborted:
                part.finish_reason = self._ended(part)
            if cut and not self.aborted and part.finish_reason == "abort":
                unfinished.append(index)
            else:
                part.retries = piece.retries
                self._left -= 1
        self._finish()
        return unfinished

    def _ended(self, part: Generation) -> FinishReason:
        """SGLang says ``abort`` of a response whose last token came in the very step in which it was cut."""
        sampling = self.request.sampling
        if part.finish_reason == "abort" and len(part.tokens):
            if part.tokens[-1] in sampling.stop_token_ids:
                return "stop"
            if len(part.tokens) >= sampling.max_tokens:
                return "length"
        return part.finish_reason

    def give_up(self, piece: Piece) -> None:
        """It was aborted while ``piece`` waited: what there is, is the answer."""
        for index in range(piece.first, piece.first + piece.request.n):
            part = self._parts[index] = self._parts[index] or replace(NOTHING)
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


NOTHING = Generation(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32), finish_reason="abort")


def _is_whole(part: Generation | None) -> bool:
    return part is not None and part.finish_reason != "abort"


@dataclass(eq=False, slots=True)
class Piece:
    """A request as an engine is asked for it: responses ``first`` to ``first + request.n - 1`` of a job."""

    job: Job
    request: GenerateRequest
    first: int
    retries: tuple[str, ...] = ()
    not_on: int | None = None
    """The engine that was too slow with it."""
    together: int = 0
    """Pieces of different numbers share no call: those of one would wait for the longest of another."""

    def too_often(self, limit: int) -> EngineError | None:
        """The error to end with, where it was asked for again more than ``limit`` times."""
        if len(self.retries) <= limit:
            return None
        reasons = "\n  ".join(self.retries)
        return EngineError(
            f"request {self.job.request.id!r} failed {len(self.retries)} times (rollout.request_retries = {limit}):"
            f"\n  {reasons}"
        )
