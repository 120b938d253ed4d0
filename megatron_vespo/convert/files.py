"""Bytes of files read and written at a place, and the tensors that they are."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_vespo.weights.mapping import WeightsError

_WRITE_BYTES = 1 << 18
"""In one call: for larger ones Linux (6.18, ext4) looks for large pages, which took up to 8 times the CPU time."""
_FLUSH_BYTES = 64 << 20
"""Of a file, after which they are sent on to the disk, which is busy then while the next ones are made."""


class Files:
    """Files opened once, for any number of threads."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._unflushed: dict[int, int] = defaultdict(int)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushed: list[Future[None]] = []

    def descriptor(self, file: Path) -> int:
        """Raises WeightsError naming a file that cannot be opened."""
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, self._flags, 0o644)
                except OSError as error:
                    raise WeightsError(f"{file}: {error.strerror}") from None
            return self._open[file]

    def read(self, file: Path, start: int, into: torch.Tensor, what: str) -> None:
        """Fills ``into`` (contiguous) from byte ``start`` on. Raises WeightsError naming the file and ``what``."""
        view, descriptor = as_bytes(into).numpy().data, self.descriptor(file)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise WeightsError(f"{file}: {what} cannot be read: {error.strerror}") from None
            if not count:
                raise WeightsError(
                    f"{file}: ends at byte {start + done}, in the middle of {what}: the file is truncated"
                )
            done += count

    def write(self, file: Path, start: int, tensor: torch.Tensor) -> None:
        """``tensor``: contiguous. Raises WeightsError naming the file where the disk is full."""
        view, descriptor = as_bytes(tensor).numpy().data, self.descriptor(file)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(descriptor, view[done : done + _WRITE_BYTES], start + done)
            except OSError as error:
                raise WeightsError(
                    f"{file}: cannot be written at byte {start + done}: {error.strerror}; once that is mended, the "
                    "same command goes on from here"
                ) from None
        with self._lock:
            self._unflushed[descriptor] += done
            if self._unflushed[descriptor] >= _FLUSH_BYTES:
                self._unflushed[descriptor] = 0
                self._flushed.append(self._flusher.submit(_flush, file, descriptor))

    def close(self, *, sync: bool = False) -> None:
        """``sync``: everything is on the disk when this returns. Raises WeightsError naming a file that is not."""
        self._flusher.shutdown(cancel_futures=True)
        with self._lock:
            flushed, self._flushed = self._flushed, []
            try:
                for file, descriptor in self._open.items() if sync else ():
                    _flush(file, descriptor)
            finally:
                for descriptor in self._open.values():
                    os.close(descriptor)
                self._open.clear()
        for future in flushed if sync else ():
            # An error of the disk is told once a descriptor: what an earlier flush was told, the last one is not.
            if not future.cancelled():
                future.result()


def _flush(file: Path, descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise WeightsError(f"{file}: did not get to the disk: {error.strerror}") from None


class Scratch(threading.local):
    """A buffer that each thread uses again and again: fresh memory costs as much as a copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], until the thread's next call."""
        if len(self._buffer) < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffer[:nbytes]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 [nbytes], not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8)


Tick = Callable[[int], None]
"""Told how many bytes are done. Raises where the work is to stop."""
