"""Four ranks at a time on this machine, however many pytest processes there are (`pytest -n`)."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLOTS = 4
FOLDER = Path(tempfile.gettempdir()) / f"rank-slots-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"


@contextmanager
def rank_slots(count: int) -> Iterator[list[int]]:
    """Waits until ``count`` ranks may run. Yields descriptors of locked files: a child that is given them holds the
    slots for as long as it lives."""
    taken: list[int] = []
    try:
        if not FOLDER.exists():
            FOLDER.mkdir(exist_ok=True)
            atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
        with (FOLDER / "gate").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)  # one collects at a time: of two, each could have what the other wants
            taken += _free(count)
            while len(taken) < count:
                time.sleep(0.05)
                taken += _free(count - len(taken))
        yield taken
    finally:
        for file in taken:
            os.close(file)


def _free(most: int) -> list[int]:
    found: list[int] = []
    for slot in range(SLOTS):
        if len(found) == most:
            break
        file = os.open(FOLDER / str(slot), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(file)
        except BlockingIOError:
            os.close(file)
    return found
