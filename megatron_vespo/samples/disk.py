"""Room on a disk before something is written there, and a digest of what was."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import xxhash

SPARE_BYTES = 64 << 20
"""Left for what is small: metrics, logs, the ledger's own transactions."""
CHUNK_BYTES = 4 << 20


class DiskFull(RuntimeError):
    """What was to be written does not fit, and nothing of it has been. The message names folder and bytes."""


def free_bytes(folder: Path) -> int:
    """At ``folder``, or the nearest above it that exists."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def require_space(folder: Path, needed: int, what: str, free: int | None = None) -> None:
    """Raises :class:`DiskFull` unless ``needed`` bytes are free at ``folder`` (``free``: that, where it is known)."""
    free = free_bytes(folder) if free is None else free
    if free < needed + SPARE_BYTES:
        raise DiskFull(
            f"{folder}: {what} needs {needed:,} bytes (and {SPARE_BYTES:,} to spare) and {free:,} are free there. "
            "Free some, or move run_dir; started again, the run goes on from its newest checkpoint."
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether a failed write (an OSError, or what a library made of one) was for want of room."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or "quota exceeded" in str(error)


def file_digest(path: Path) -> str:
    """xxh3_128 of the file's bytes, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
