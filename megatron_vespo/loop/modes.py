"""``train.mode``: which algorithm a run follows."""

from __future__ import annotations

from megatron_vespo.loop import asynchronous, constant_lag, synchronous
from megatron_vespo.loop.run import Run

MODES = {
    "synchronous": synchronous.train,
    "asynchronous": asynchronous.train,
    "constant_lag": constant_lag.train,
}


def train(run: Run) -> None:
    """From where the run stands to ``train.steps``."""
    MODES[run.config.train.mode](run)
