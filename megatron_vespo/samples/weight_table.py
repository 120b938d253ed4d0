"""What an optimizer update made of each of its responses: their sequence weights and what they were worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True)
class WeightTable:
    """One row a response, all columns [n] float64. Plain columns, so that the parts of ranks are laid end to end."""

    lengths: np.ndarray
    """Counted tokens."""
    advantages: np.ndarray
    log_w_stale: np.ndarray
    """Sum over the response of log pi - log pi_old."""
    log_w_engine: np.ndarray
    """Sum over the response of log pi_old - log mu."""
    phi: np.ndarray
    """What the objective makes of the response: objectives/coefficients.py. 1 on policy; NaN where A = 0."""
    phi_stale: np.ndarray
    """phi had the engine sampled with the trainer's own log-probs."""
    phi_engine: np.ndarray
    """phi had the weights not moved since."""

    @property
    def log_w(self) -> np.ndarray:
        """[n] log of pi / mu, whichever ratio the objective itself works on."""
        return self.log_w_stale + self.log_w_engine

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, chosen: np.ndarray) -> WeightTable:
        """Those at the indices, or under the mask, ``chosen``."""
        return WeightTable(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


def stacked(tables: Sequence[WeightTable]) -> WeightTable:
    """The rows of all ``tables``, in order; of none, a table without rows."""
    return WeightTable(
        **{f.name: np.concatenate([np.empty(0), *(getattr(t, f.name) for t in tables)]) for f in fields(WeightTable)}
    )
