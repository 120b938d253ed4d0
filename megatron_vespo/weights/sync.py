"""How a version of the weights reaches the engines: what every transport is asked, tells, and proves."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_vespo.weights.buckets import Named, TensorSpec

Checksums = dict[str, str]
T = TypeVar("T")


class SyncError(RuntimeError):
    """The engines do not hold or do not compute what the trainer does after a weight sync."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one sync did."""

    version: int
    seconds: float
    bytes: int
    """Sent to each engine."""
    full_bytes: int
    """Of all tensors: what is sent without deltas."""
    tensors: int
    checked: int
    """Tensors whose checksums were compared at both ends, on every engine; 0 where an engine reports none."""

    def metrics(self) -> dict[str, float]:
        return {
            "sync_seconds": self.seconds,
            "sync_bytes": self.bytes,
            "sync_full_bytes": self.full_bytes,
            "sync_bytes_per_s": self.bytes / self.seconds,
            "sync_tensors": self.tensors,
            "sync_tensors_checked": self.checked,
        }


class WeightTransport(Protocol):
    """The sender: in rank 0 of the trainer."""

    def publish(self, version: int, tensors: Iterable[Named]) -> SyncReport:
        """Bring all engines from whatever they have to ``version``, given as the stream of :func:`~.export.export_hf`.

        No engine generates between the first weight that it loads and the last, and what it generates then carries
        ``version``. Raises SyncError with the name of a tensor that did not arrive as it was sent; the engines stay
        paused then, as after any error.
        """

    def close(self) -> None:
        """Let go of the engines, which go on."""


class EngineWeights(Protocol):
    """The receiver: one engine, as a transport sees it. Every call raises an error that names the engine.

    A call that returns checksums returns None from an engine that takes none.
    """

    url: str

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def load_folder(self, folder: Path, version: int) -> Checksums | None:
        """Load an HF folder whole, and be of ``version``."""

    def begin_update(self) -> str | None:
        """Expect buckets; returns the combined checksum of the version kept for deltas."""

    def end_update(self) -> Checksums | None: ...

    def set_version(self, version: int) -> None: ...

    def ranks(self) -> int:
        """How many processes of the engine receive a broadcast."""

    def join_broadcast(self, group: str, address: str, port: int, first_rank: int, size: int, backend: str) -> None:
        """Have its processes join as ``first_rank`` and following of ``size``; returns when they have."""

    def leave_broadcast(self, group: str) -> None: ...

    def receive_broadcast(self, group: str, specs: Sequence[TensorSpec]) -> None:
        """Take part in the broadcast of a bucket and load it."""

    def receive_shared(self, place: Callable[[], str], specs: Sequence[TensorSpec]) -> None:
        """Load a bucket from memory of this machine, opened by :func:`~.transports.place.open_place`. ``place`` is
        called once for each process of the engine."""


def on_each(engines: Sequence[EngineWeights], ask: Callable[[EngineWeights], T]) -> list[T]:
    """``ask`` of all engines at once."""
    return at_once([lambda engine=engine: ask(engine) for engine in engines])  # type: ignore[misc]


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of all, or the first failure at once, though others may still wait for what will not come."""
    answers: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()

    def answer(index: int) -> None:
        try:
            answers.put((index, calls[index](), None))
        except BaseException as error:
            answers.put((index, None, error))

    for index in range(len(calls)):
        # Daemons: one that waits for ever must not keep the process from ending.
        threading.Thread(target=answer, args=(index,), daemon=True).start()
    results: dict[int, T] = {}
    while len(results) < len(calls):
        index, result, error = answers.get()
        if error is not None:
            raise error
        results[index] = result  # type: ignore[assignment]
    return [results[index] for index in range(len(calls))]


def prove(engines: Sequence[EngineWeights], sent: Mapping[str, str], arrived: Sequence[Checksums | None]) -> int:
    """How many tensors were compared on every engine. Raises SyncError naming the engine and the first that differs."""
    for engine, found in zip(engines, arrived, strict=True):
        if found is None:
            continue
        wrong = sorted(name for name in sent.keys() | found.keys() if sent.get(name) != found.get(name))
        if wrong:
            name = wrong[0]
            raise SyncError(
                f"weight sync: {name} was sent with checksum {sent.get(name, '(none)')} and is at {engine.url} with "
                f"{found.get(name, '(none: it did not arrive)')}; {len(wrong)} of {len(sent)} tensors differ"
            )
    return len(sent) if all(found is not None for found in arrived) else 0
