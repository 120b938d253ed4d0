"""Ending a run at a step boundary, to go on later: whoever wants it creates the file ``stop`` in the run directory.

A file and not a signal, because it reaches the driver through containers, srun and kubectl, and no child of it.
"""

from __future__ import annotations

from pathlib import Path

STOPPED = 75
"""Exit code of a run that was asked to stop and did (EX_TEMPFAIL: the same command goes on)."""


class StoppedEarly(Exception):
    """The run ended where it was asked to, with a checkpoint."""


def stop_file(directory: Path) -> Path:
    return directory / "stop"
