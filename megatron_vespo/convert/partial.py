"""A folder that is made beside its place, renamed into it, and gone on with after a conversion was killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from megatron_vespo.config.load import ConfigError

JOURNAL = "journal.jsonl"
Entry = dict[str, Any]
"""dtype, shape and checksum of a tensor."""


class Partial:
    """``OUT.partial``. Its journal says what it is made from, and then each tensor that was written, with its checksum.

    Raises ConfigError for an OUT that exists, for what another conversion left, and while another process is at work.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """``identity``: whatever the content depends on; JSON."""
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        if out.exists():
            raise ConfigError(f"{out}: is there already and is not replaced; remove it, or give another OUT")
        journal = self.folder / JOURNAL
        if self.folder.exists() and not journal.is_file():
            raise ConfigError(f"{self.folder}: is there, and no conversion left it; remove it, or give another OUT")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = journal.open("a+")
        self._lock = threading.Lock()
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{self.folder}: another process is converting into it") from None
        self.done = self._read(identity)
        """HF tensor -> entries of what was written for it."""

    def _read(self, identity: dict[str, Any]) -> dict[str, dict[str, Entry]]:
        self._journal.seek(0)
        whole, _, torn = self._journal.read().rpartition("\n")
        if torn:  # killed within a line
            self._journal.truncate(len(whole.encode()) + bool(whole))
        if not whole:
            self._append(identity)
            return {}
        first, *lines = (json.loads(line) for line in whole.split("\n"))
        if first != json.loads(json.dumps(identity)):
            differing = sorted(key for key in first.keys() | identity.keys() if first.get(key) != identity.get(key))
            raise ConfigError(
                f"{self.folder}: left by another conversion ({', '.join(differing)} differ); remove it to begin anew, "
                "or give another OUT"
            )
        return {line["tensor"]: line["written"] for line in lines}

    def record(self, name: str, written: dict[str, Entry]) -> None:
        with self._lock:
            self.done[name] = written
            self._append({"tensor": name, "written": written})

    def _append(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()

    def require_space(self, nbytes: int) -> None:
        """Raises ConfigError where the disk has no room for what is still missing of ``nbytes``."""
        there = sum(file.stat().st_blocks * 512 for file in self.folder.iterdir() if file.name != JOURNAL)
        free, needed = shutil.disk_usage(self.folder).free, nbytes - there
        if needed > free:
            raise ConfigError(
                f"{self.folder}: needs {needed:,} bytes more, and its disk has {free:,} free; make room, or give an "
                "OUT on another disk"
            )

    def commit(self) -> None:
        """OUT is there, whole, or not at all."""
        self.folder.rename(self.out)
        descriptor = os.open(self.out.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        (self.out / JOURNAL).unlink()
        self._journal.close()

    def close(self) -> None:
        """What is done stays for the next time; if nothing is, nothing stays."""
        self._journal.close()
        if not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)
