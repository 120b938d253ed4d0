"""Grading in processes that can be killed: a hang or a crash costs one response its reward, never the run.

A worker that someone else kills (SIGKILL: the kernel's out-of-memory killer, an operator) costs nothing: what it had is
graded again, in another one.

A worker is a fresh interpreter, ``python -m megatron_vespo.rewards.worker``, that speaks through one inherited pipe.
Not multiprocessing's spawn, which re-imports the parent's main module (and with it torch) into every worker; not fork,
which is unsafe under threads and CUDA.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait

from megatron_vespo.config.load import ConfigError
from megatron_vespo.rewards import RewardError, RewardFunction, build_reward
from megatron_vespo.rewards.grader import Grader, Scored

START_TIMEOUT_S = 120.0
"""A worker imports sympy before it is ready; on a loaded machine that takes seconds."""
MAX_CHUNK = 16
MAX_KILLS = 3
"""Workers that may be killed over one response before it scores 0; and while they start, before the run ends."""
MEMORY_LIMIT_BYTES = 8 * 2**30
"""Address space of a worker: expanding (x+y+z)^{2000} must end in a MemoryError, not in the machine's swap."""


@dataclass(slots=True)
class GradingCounts:
    """Totals since the workers started."""

    graded: int = 0
    errors: int = 0
    """The function raised, or returned no finite number."""
    timeouts: int = 0
    crashes: int = 0
    kills: int = 0
    """Workers that someone else killed."""
    seconds: float = 0.0
    """Wall time inside :meth:`RewardWorkers.score`."""


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen
    pipe: Connection
    pending: deque[int] = field(default_factory=deque)
    """Indices of the pairs it was given and has not answered; the first is the one it grades now."""
    ready: bool = False
    deadline: float = 0.0


@dataclass(frozen=True, slots=True)
class _Batch:
    pairs: Sequence[tuple[str, str]]
    named: Sequence[str]
    results: list[Scored | None]
    queue: deque[int]
    """Indices of the pairs that no worker has."""


class RewardWorkers:
    """``workers`` warm processes that grade batches with ``reward`` (functions of it importable: module-level).

    ``timeout_s`` bounds the grading of one response. Not thread-safe: one caller at a time. Raises
    :class:`RewardError` if a worker cannot start.
    """

    def __init__(self, reward: Grader | RewardFunction, workers: int, timeout_s: float) -> None:
        self.grader = reward if isinstance(reward, Grader) else Grader.of(reward)
        for part in self.grader.parts:
            if build_reward_or_none(part.path) is not part.function:
                raise RewardError(
                    f"{part.path} cannot be imported by a worker. Put the reward function at the top level of a module."
                )
        self.timeout_s = timeout_s
        self.counts = GradingCounts()
        self._killed_with: Counter[int] = Counter()
        """Index of a pair -> workers that were killed while they graded it."""
        self._workers = [self._start() for _ in range(workers)]

    def score(self, pairs: Sequence[tuple[str, str]], named: Sequence[str] | None = None) -> list[Scored]:
        """Grade ``(response, answer)`` pairs; result i belongs to pair i. ``named``: the part that each names, or an
        empty text; None: none does."""
        batch = _Batch(pairs, named or [""] * len(pairs), [None] * len(pairs), deque(range(len(pairs))))
        started = time.perf_counter()
        self._killed_with.clear()
        chunk = max(1, min(MAX_CHUNK, math.ceil(len(pairs) / (4 * len(self._workers)))))
        while batch.queue or any(worker.pending for worker in self._workers):
            for index, worker in enumerate(self._workers):
                if worker.ready and not worker.pending:
                    self._give(worker, batch, chunk)
                elif worker.deadline < time.monotonic() and not worker.pipe.poll():
                    self._replace(index, batch, timed_out=True)
            self._collect(batch)
        self.counts.graded += len(pairs)
        self.counts.seconds += time.perf_counter() - started
        return [result for result in batch.results if result is not None]

    def close(self) -> None:
        for worker in self._workers:
            self._stop(worker)
        self._workers = []

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        ours, theirs = Pipe(duplex=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        spec = json.dumps(self.grader.spec())
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), spec, str(self.timeout_s)]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        return _Worker(process, ours, deadline=time.monotonic() + START_TIMEOUT_S)

    def _give(self, worker: _Worker, batch: _Batch, chunk: int) -> None:
        if not batch.queue:
            return
        worker.pending.extend(batch.queue.popleft() for _ in range(min(chunk, len(batch.queue))))
        # A pipe whose reader has died: _collect sees it at once and replaces the worker.
        with contextlib.suppress(OSError):
            worker.pipe.send([(*batch.pairs[i], batch.named[i]) for i in worker.pending])
        worker.deadline = time.monotonic() + self.timeout_s

    def _collect(self, batch: _Batch) -> None:
        """Take in whatever arrives before the next deadline."""
        busy = {worker.pipe: i for i, worker in enumerate(self._workers) if worker.pending or not worker.ready}
        nearest = min((self._workers[i].deadline for i in busy.values()), default=0.0)
        for pipe in wait(list(busy), timeout=max(0.0, nearest - time.monotonic())):
            index = busy[pipe]  # type: ignore[index]
            worker = self._workers[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self._replace(index, batch, timed_out=False)
                continue
            worker.deadline = time.monotonic() + self.timeout_s
            if message == "ready":
                worker.ready = True
                continue
            self.counts.errors += message.error is not None
            batch.results[worker.pending.popleft()] = message

    def _replace(self, index: int, batch: _Batch, timed_out: bool) -> None:
        """Put a new worker in the place of one that hung or died; only the response at fault scores 0."""
        worker = self._workers[index]
        if not timed_out:
            # Its end of the pipe closes a moment before it ends, and its exit code is worth reporting.
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=5)
        self._stop(worker)
        killed = not timed_out and worker.process.returncode == -signal.SIGKILL
        if killed and self._forgiven(worker):
            batch.queue.extendleft(reversed(worker.pending))
            self._workers[index] = self._start()
            return
        if not worker.ready:
            raise RewardError(
                f"a grading worker for {self.grader} did not start (exit code {worker.process.returncode}); "
                "its error stands above in this process's log."
            )
        guilty = worker.pending.popleft()
        if timed_out:
            self.counts.timeouts += 1
            error = f"grading took more than {self.timeout_s:g} s and was killed"
        else:
            self.counts.crashes += 1
            error = f"the grading process died (exit code {worker.process.returncode})"
        batch.results[guilty] = self.grader.failed(error, batch.named[guilty])
        batch.queue.extendleft(reversed(worker.pending))
        self._workers[index] = self._start()

    def _forgiven(self, worker: _Worker) -> bool:
        """Whether what a killed worker had is worth another try: not where it takes every worker with it."""
        self.counts.kills += 1
        guilty = worker.pending[0] if worker.pending else -1  # it had not come to be ready
        self._killed_with[guilty] += 1
        return self._killed_with[guilty] <= MAX_KILLS

    @staticmethod
    def _stop(worker: _Worker) -> None:
        worker.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            # The whole session: a reward function may have started processes of its own.
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()


def build_reward_or_none(path: str) -> RewardFunction | None:
    try:
        return build_reward(path)
    except ConfigError:
        return None


def serve(pipe: Connection, grader: Grader, timeout_s: float) -> None:
    """A worker's life: answer each pair of each batch at once, until the parent closes the pipe."""
    pipe.send("ready")
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, ConnectionError):
            return
        for item in batch:
            # The parent kills at timeout_s. If it is gone, the kernel does: SIGALRM's default action ends the process
            # even inside a C loop that holds the interpreter's lock.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 5)
            pipe.send(grader(*item))
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(arguments: Sequence[str]) -> None:
    descriptor, spec, timeout_s = arguments
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > MEMORY_LIMIT_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, hard))
    with contextlib.suppress(BrokenPipeError):
        serve(Connection(int(descriptor)), Grader.from_spec(json.loads(spec)), float(timeout_s))


if __name__ == "__main__":
    main(sys.argv[1:])
