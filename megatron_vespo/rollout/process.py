"""An engine's operating-system process: started in a session of its own, watched, and ended with all its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
LOG_TAIL_LINES = 25


class EngineProcess:
    """A command in its own session, its output in ``log_file``; it does not outlive this process (see guard.py)."""

    def __init__(self, command: Sequence[str], log_file: Path, env: Mapping[str, str] | None = None) -> None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self.command = tuple(command)
        self.log_file = log_file
        with log_file.open("ab") as log:
            self._log_start = log.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-S", "-E", str(GUARD), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n when signal n ended it."""
        code = self._guard.poll()
        return code if code is None or code >= 0 else 128 - code

    def pids(self) -> list[int]:
        """Every living process of its session."""
        return _session_members(self._guard.pid)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def exit_report(self) -> str:
        """One paragraph for an error message: how it ended and what it said last."""
        return (
            f"the engine process exited with code {self.exit_code()}; the end of {self.log_file}:\n"
            f"{self.log_tail() or '(empty)'}"
        )

    def shutdown(self, grace_s: float = 5.0) -> None:
        """SIGTERM to the session, SIGKILL after ``grace_s``; returns when no process of it is left."""
        session = self._guard.pid
        deadline = time.monotonic() + grace_s
        _signal_all(session, signal.SIGTERM)
        while _session_members(session):
            if time.monotonic() >= deadline:
                _signal_all(session, signal.SIGKILL)
            self._guard.poll()  # reaps it
            time.sleep(0.02)
        self._guard.wait()


def _signal_all(session: int, number: signal.Signals) -> None:
    for pid in _session_members(session):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(pid, number)


def _session_members(session: int) -> list[int]:
    """Living processes of a session. Not only of the group: an engine may put its workers into groups of their own."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # After the command's closing bracket: state, parent, group, session (proc(5)).
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members
