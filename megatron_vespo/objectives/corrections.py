"""What is done about the mismatch between engine and trainer: which policy a ratio has in its denominator.

W = W_stale * W_engine, with log W_stale = log pi - log pi_old and log W_engine = log pi_old - log mu. A correction says
how the two make the ratio that an objective sees. It is linear in both, so that one function serves tokens and sums.

    none     W = W_stale * W_engine = pi / mu: the engine is the behaviour policy (the authors' asynchronous script).
    trainer  W = W_stale = pi / pi_old: the mismatch is left alone (the authors' synchronous scripts, which recompute
             pi_old and use the engine's log-probs for metrics only).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch

Correction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log W_stale, log W_engine) -> log ratio; all [T] (one token each) or all [S] (summed over a response)."""


def engine_inside(log_stale: torch.Tensor, log_engine: torch.Tensor) -> torch.Tensor:
    return log_stale + log_engine


def engine_ignored(log_stale: torch.Tensor, log_engine: torch.Tensor) -> torch.Tensor:
    return log_stale


CORRECTIONS: dict[str, Correction] = {"none": engine_inside, "trainer": engine_ignored}


def get_correction(name: str) -> Correction:
    """The correction of that name; ValueError with the nearest name otherwise."""
    if name not in CORRECTIONS:
        near = difflib.get_close_matches(name, CORRECTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown correction {name!r}{hint} (available: {', '.join(CORRECTIONS)})")
    return CORRECTIONS[name]
