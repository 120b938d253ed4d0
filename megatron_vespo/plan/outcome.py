"""What a simulated or a measured run came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """Of a window of time that begins and ends with an update (synchronous: with a step)."""

    seconds: float
    updates: int
    samples: int
    """Responses trained."""
    tokens: int
    """Of prompts and responses trained, as the trainer counts them."""
    staleness: np.ndarray
    """[lags] response tokens trained at each lag, in updates."""
    trainer_idle: float
    """Share of the time in which the trainer waits for samples."""
    trainer_sync: float
    """Share in which it publishes weights."""
    engine_idle: float
    """Share in which an engine has nothing to decode, or is paused; mean over the engines."""
    engine_running: float | None
    """Running responses an engine, mean over the time; None: not known."""
    dropped: float
    """Share of the groups that were trained or dropped that was dropped."""
    late: float
    """Share of the trained groups that had a token older than the maximum."""
    asked: int = 0
    """Prompt groups from the beginning, before the window too."""
    trained: int = 0
    """Likewise."""
    dropped_groups: int = 0
    """Likewise."""
    open: int = 0
    """Groups asked, neither trained nor dropped at the end."""

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def updates_per_hour(self) -> float:
        return 3600 * self.updates / self.seconds

    @property
    def staleness_mean(self) -> float:
        return float(self.staleness @ np.arange(len(self.staleness))) / max(1.0, float(self.staleness.sum()))

    @property
    def staleness_p95(self) -> int:
        """The least lag that 95 % of the tokens do not exceed."""
        below = np.cumsum(self.staleness) / max(1.0, float(self.staleness.sum()))
        return int(np.searchsorted(below, 0.95 - 1e-12))

    @property
    def staleness_max(self) -> int:
        return int(np.flatnonzero(self.staleness).max(initial=0))

    def summary(self) -> dict[str, Any]:
        """For JSON: shares and rates, not the counts behind them."""
        return {
            "samples_per_s": self.samples_per_s,
            "tokens_per_s": self.tokens_per_s,
            "updates_per_hour": self.updates_per_hour,
            "trainer_idle": self.trainer_idle,
            "trainer_sync": self.trainer_sync,
            "engine_idle": self.engine_idle,
            "engine_running": self.engine_running,
            "staleness_mean": self.staleness_mean,
            "staleness_p95": self.staleness_p95,
            "staleness_max": self.staleness_max,
            "staleness_tokens": self.staleness.tolist(),
            "dropped": self.dropped,
            "late": self.late,
        }
