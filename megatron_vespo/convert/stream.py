"""Tensors from one folder to another, a few rows at a time, by several threads, resumed where they were stopped.

Reading, writing and hashing release Python's lock; a thread holds a band of rows and nothing else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_vespo.convert.files import Scratch
from megatron_vespo.convert.partial import Entry, Partial
from megatron_vespo.weights.checksum import Digest
from megatron_vespo.weights.fp8 import BLOCK
from megatron_vespo.weights.mapping import Shape, WeightsError
from megatron_vespo.weights.save import CHECKSUM_FILE

BAND_ELEMENTS = 1 << 21
"""Read, hashed and written at a time: small enough to stay in a cache."""
DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


class TensorInfo(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Shape: ...


class Source(Protocol):
    """HF tensors to read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def stored_dtype(self, name: str) -> torch.dtype:
        """Of what :meth:`read` fills."""

    def read(self, name: str, row: int, into: torch.Tensor) -> torch.Tensor:
        """Rows from ``row`` on (a multiple of 128), read into ``into``; returns them as ``tensors`` describes them."""

    def checksum(self, name: str) -> str | None:
        """Of a tensor that is given as it is stored, where the folder tells it."""

    def where(self, name: str) -> str:
        """Its files and its names, for messages."""


class Target(Protocol):
    """HF tensors to write."""

    nbytes: int

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def write(self, name: str, row: int, rows: torch.Tensor) -> None: ...
    def read(self, name: str, row: int, into: torch.Tensor) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


Written = list[tuple[str, int, torch.Tensor]]
"""(name in the target, first row, rows)."""
Change = Callable[[str, int, torch.Tensor], Written]
"""What becomes of rows: their name, the first one's number, the rows -> what is written."""


class Stopped(Exception):
    """Another thread failed, or the user has had enough."""


class TransferBar:
    """Bytes done, GB/s and time left on a terminal; nothing elsewhere."""

    def __init__(self, what: str, total: int, console: Console) -> None:
        self._bar = Progress(
            TextColumn(f"[bold]{what}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total)
        self.stopped = threading.Event()

    def __enter__(self) -> TransferBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, nbytes: int) -> None:
        if self.stopped.is_set():
            raise Stopped
        self._bar.advance(self._task, nbytes)


def bands(source: Source, name: str, scratch: Scratch) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first row, rows as they are stored, rows as the source gives them); they are overwritten by the next ones."""
    info, stored = source.tensors[name], source.stored_dtype(name)
    for row, into in _rows(info.shape, stored, scratch):
        yield row, into, source.read(name, row, into)


def _rows(shape: Shape, dtype: torch.dtype, scratch: Scratch) -> Iterator[tuple[int, torch.Tensor]]:
    width = torch.Size(shape[1:]).numel()
    count = max(1, BAND_ELEMENTS // width // BLOCK) * BLOCK  # whole blocks of fp8; the same whatever the dtype
    for row in range(0, shape[0], count):
        rows = min(count, shape[0] - row)
        yield row, scratch.take(rows * width * dtype.itemsize).view(dtype).view(rows, *shape[1:])


class Transfer:
    """From ``source`` into a partial folder, by way of ``target``, whatever a ``change`` makes of the rows."""

    def __init__(self, source: Source, target: Target, partial: Partial, change: Change) -> None:
        self._source, self._target, self._partial, self._change = source, target, partial, change
        self._scratch = Scratch()

    def run(self, sizes: Mapping[str, int], workers: int, what: str, console: Console) -> int:
        """``sizes``: the source's tensors to take, and their bytes. Returns how many were there already and proven.

        Raises WeightsError for a tensor that is not what its checksum says, and where the disk fills up.
        """
        proven = 0
        torch.set_num_threads(1)
        with TransferBar(what, sum(sizes.values()), console) as bar:
            for already in in_threads(sizes, lambda name: self._one(name, sizes[name], bar), workers, bar):
                proven += already
        return proven

    def _one(self, name: str, nbytes: int, bar: TransferBar) -> bool:
        """Whether the tensor was there already."""
        written = self._partial.done.get(name)
        if written and all(self._read_back(part) == entry["checksum"] for part, entry in written.items()):
            bar.advance(nbytes)
            return True
        self._partial.record(name, self._copy(name, bar))
        return False

    def _copy(self, name: str, bar: TransferBar) -> dict[str, Entry]:
        expected, digests = self._source.checksum(name), dict[str, Digest]()
        before = Digest(self._source.tensors[name].dtype, self._source.tensors[name].shape) if expected else None
        changed = False
        for row, stored, rows in bands(self._source, name, self._scratch):
            written = self._change(name, row, rows)
            for part, first, result in written:
                if part not in digests:
                    info = self._target.tensors[part]
                    digests[part] = Digest(info.dtype, info.shape)
                digests[part].update(result)
                self._target.write(part, first, result)
            changed = changed or len(written) != 1 or written[0][2] is not rows
            if changed and before is not None:
                before.update(rows)
            bar.advance(stored.nbytes)
        found = {part: digest.hexdigest() for part, digest in digests.items()}
        if expected is not None and expected != (before.hexdigest() if changed and before else found[name]):
            raise WeightsError(
                f"{self._source.where(name)}: its bytes are not those that {CHECKSUM_FILE} in the same folder tells: "
                f"the file is corrupted (or was changed on purpose: remove {CHECKSUM_FILE} then)"
            )
        return {part: _entry(self._target.tensors[part], checksum) for part, checksum in found.items()}

    def _read_back(self, name: str) -> str | None:
        info = self._target.tensors[name]
        digest = Digest(info.dtype, info.shape)
        for row, into in _rows(info.shape, info.dtype, self._scratch):
            try:
                self._target.read(name, row, into)
            except WeightsError:  # what was written last did not reach the disk
                return None
            digest.update(into)
        return digest.hexdigest()


def _entry(info: TensorInfo, checksum: str) -> Entry:
    return {"dtype": str(info.dtype).removeprefix("torch."), "shape": list(info.shape), "checksum": checksum}


def in_threads(names: Mapping[str, int], work: Callable[[str], Any], workers: int, bar: TransferBar) -> Iterator[Any]:
    """``work`` of every name. The first failure stops all, and is raised."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        futures = [pool.submit(work, name) for name in names]
        wait(futures, return_when=FIRST_EXCEPTION)
        bar.stopped.set()
        for future in futures:
            failure = future.exception() if future.done() else None
            if failure is not None and not isinstance(failure, Stopped):
                raise failure
        yield from (future.result() for future in futures)
    finally:
        bar.stopped.set()
        pool.shutdown(cancel_futures=True)
