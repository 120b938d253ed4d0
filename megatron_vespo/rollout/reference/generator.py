"""The thread that decodes. Everything that changes its state runs on it, between two decode steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from megatron_vespo.rollout.protocol import ALL_MEMORY, MemoryPart, PauseMode
from megatron_vespo.rollout.reference.batch import Result, RunningBatch, Sequence
from megatron_vespo.rollout.reference.model import PREFILL_TOKENS, ReferenceModel

logger = logging.getLogger(__name__)


class Generator(threading.Thread):
    """Continuous batching over one :class:`ReferenceModel`."""

    def __init__(self, model: ReferenceModel, version: int, max_running: int) -> None:
        super().__init__(name="generator", daemon=True)
        self.model = model
        self.version = version
        self.max_running = max_running
        self.failure: BaseException | None = None
        """What ended the thread; the engine is of no use after that."""
        self._batch = RunningBatch(model)
        self._waiting: deque[Sequence] = deque()
        self._to_score: list[Sequence] = []
        self._paused: PauseMode | None = None
        self._stale_cache = False
        self._updating = False
        self._held = ALL_MEMORY
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()

    # --- asked from other threads -------------------------------------------------------------------------------

    def submit(self, sequences: list[Sequence]) -> None:
        """Each sequence's ``done`` gets its result."""
        self.call(lambda: self._accept(sequences))

    def pause(self, mode: PauseMode) -> Future[None]:
        return self.call(lambda: self._pause(mode))

    def resume(self) -> Future[None]:
        return self.call(self._resume)

    def abort(self, rid: str | None) -> Future[None]:
        """End the sequence of that name, or all; they return what they have."""
        return self.call(lambda: self._abort(rid))

    def swap(self, model: ReferenceModel, version: int, recompute: bool = True) -> Future[None]:
        """Go on under other weights: running sequences keep their tokens, and with ``recompute`` their keys are
        computed anew. That raises ValueError in a pause that keeps them in place, as SGLang refuses it."""
        return self.call(lambda: self._swap(model, version, recompute))

    def describe(self) -> Future[dict[str, Any]]:
        """Answered between two steps: a sign of life."""
        return self.call(
            lambda: {
                "running": self._batch.count,
                "waiting": len(self._waiting),
                "paused": self._paused,
                "weight_version": str(self.version),
                "memory": {"weights": self.model.weight_bytes, "kv_cache": self._batch.cache.nbytes},
            }
        )

    def begin_update(self) -> Future[ReferenceModel]:
        """Stand still, scoring included: the caller may write the weights until ``end_update``. Needs a pause."""
        return self.call(self._begin_update)

    def end_update(self) -> Future[None]:
        """Move again, running sequences with their keys computed anew."""
        return self.call(self._end_update)

    def give_up(self, parts: frozenset[MemoryPart]) -> Future[None]:
        """Free the memory of these parts; what is asked for waits until all are taken back. Needs a pause."""
        return self.call(lambda: self._give_up(parts))

    def take_back(self, parts: frozenset[MemoryPart]) -> Future[None]:
        """Weights as they were; the keys of running sequences are computed anew."""
        return self.call(lambda: self._take_back(parts))

    def set_version(self, version: int) -> Future[None]:
        return self.call(lambda: setattr(self, "version", version))

    def call(self, command: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._wake:
            if self.failure is not None:
                raise RuntimeError(f"the generator thread has died: {self.failure!r}") from self.failure
            self._commands.append((command, future))
            self._wake.notify()
        return future

    # --- on the thread ------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            with torch.inference_mode():
                while True:
                    self._run_commands()
                    self._advance()
        except BaseException as error:
            logger.exception("the generator thread has died")
            with self._wake:
                self.failure = error
                commands, self._commands = self._commands, deque()
            for _, future in commands:
                future.set_exception(error)
            for sequence in [*self._batch.sequences, *self._waiting, *self._to_score]:
                sequence.done.set_exception(error)

    def _run_commands(self) -> None:
        with self._wake:
            while not self._commands and not self._has_work():
                self._wake.wait()
            commands, self._commands = self._commands, deque()
        for command, future in commands:
            try:
                future.set_result(command())
            except Exception as error:
                future.set_exception(error)

    def _has_work(self) -> bool:
        if self._stands_still:
            return False
        return bool(self._to_score) or (not self._paused and bool(self._batch.count or self._waiting))

    @property
    def _stands_still(self) -> bool:
        return self._updating or self._held != ALL_MEMORY

    def _advance(self) -> None:
        if self._stands_still:
            return
        if self._to_score:
            self._score()
        if self._paused:
            return
        if self._stale_cache:
            self._batch.fill(self.model, range(self._batch.count))
            self._stale_cache = False
        room = min(self.max_running - self._batch.count, len(self._waiting))
        if room > 0:
            self._batch.add(self.model, [self._waiting.popleft() for _ in range(room)])
        if self._batch.count:
            self._finish(self._batch.decode(self.model, self.version))

    def _score(self) -> None:
        """One forward over waiting sequences of like length, at most PREFILL_TOKENS padded tokens."""
        self._to_score.sort(key=lambda sequence: len(sequence.prompt), reverse=True)
        longest = len(self._to_score[0].prompt)
        size = max(1, PREFILL_TOKENS // longest)
        scored, self._to_score = self._to_score[:size], self._to_score[size:]
        tokens = torch.zeros(len(scored), longest, dtype=torch.long)
        for row, sequence in enumerate(scored):
            tokens[row, : len(sequence.prompt)] = torch.from_numpy(sequence.prompt)
        logprobs = self.model.score(tokens).numpy()
        for row, sequence in enumerate(scored):
            result = self._empty_result("length")
            result.prompt_logprobs = logprobs[row, : len(sequence.prompt) - 1].copy()
            sequence.done.set_result(result)

    def _accept(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.done.set_running_or_notify_cancel()  # from here on only a result ends it
            if sequence.max_tokens == 0:
                self._to_score.append(sequence)
            else:
                self._waiting.append(sequence)

    def _pause(self, mode: PauseMode) -> None:
        self._paused = mode
        if mode == "abort":
            self._abort(None)

    def _resume(self) -> None:
        self._paused = None

    def _swap(self, model: ReferenceModel, version: int, recompute: bool) -> None:
        if recompute and self._paused == "in_place" and self._batch.count:
            raise ValueError(
                f"{self._batch.count} responses are paused in place and keep the old weights' keys: flush_cache must "
                "be false, or the pause of mode retract"
            )
        self._check_weights()
        self.model, self.version = model, version
        self._stale_cache = self._stale_cache or recompute

    def _begin_update(self) -> ReferenceModel:
        if not self._paused:
            raise ValueError("pause_generation must come before begin_weight_update")
        if self._updating:
            raise ValueError("a weight update is already open; end_weight_update ends it")
        self._check_weights()
        self._updating = True
        return self.model

    def _end_update(self) -> None:
        if not self._updating:
            raise ValueError("no weight update is open")
        self._updating, self._stale_cache = False, True

    def _give_up(self, parts: frozenset[MemoryPart]) -> None:
        if not self._paused or self._updating:
            raise ValueError("pause_generation must come before release_memory_occupation, and no update may be open")
        if not parts <= self._held:
            raise ValueError(f"{', '.join(sorted(parts - self._held))}: released already")
        if "kv_cache" in parts:
            self._batch.cache.empty()
            self._stale_cache = True
        if "weights" in parts:
            self.model.give_up_weights()
        self._held -= parts

    def _take_back(self, parts: frozenset[MemoryPart]) -> None:
        if parts & self._held:
            raise ValueError(f"{', '.join(sorted(parts & self._held))}: not released")
        if "weights" in parts:
            self.model.take_back_weights()
        self._held |= parts

    def _check_weights(self) -> None:
        if "weights" not in self._held:
            raise ValueError("the weights are released: resume_memory_occupation must come before new ones")

    def _abort(self, rid: str | None) -> None:
        rows = [row for row, sequence in enumerate(self._batch.sequences) if rid in (None, sequence.rid)]
        if rows:
            self._finish(self._batch.remove({row: "abort" for row in rows}, self.version))
        aborted = [sequence for sequence in self._waiting if rid in (None, sequence.rid)]
        self._waiting = deque(sequence for sequence in self._waiting if rid not in (None, sequence.rid))
        self._finish([(sequence, self._empty_result("abort")) for sequence in aborted])

    def _empty_result(self, reason: Any) -> Result:
        return Result(
            tokens=np.empty(0, np.int64),
            logprobs=np.empty(0, np.float32),
            versions=np.empty(0, np.int32),
            finish_reason=reason,
            version=self.version,
        )

    @staticmethod
    def _finish(ended: list[tuple[Sequence, Result]]) -> None:
        for sequence, result in ended:
            sequence.done.set_result(result)
