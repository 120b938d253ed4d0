"""What the rest of the stack may ask of a rollout engine. SGLang and the reference engine both answer it.

Tokens in, tokens out: an engine never sees text, and nothing is ever retokenised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_vespo.samples.records import FinishReason, RoutingShape


class EngineError(RuntimeError):
    """An engine refused, died or hung. The message names the engine's address and what was asked of it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Log-probs are those of the distribution at this temperature, before top-p and top-k."""

    max_tokens: int
    temperature: float = 1.0
    """0: greedy, and then log-probs are those at temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the response, and so does the checkpoint's own end-of-sequence token. Empty: neither,
    responses run to max_tokens."""


@dataclass(slots=True)
class GenerateRequest:
    """Ask for ``n`` responses to one prompt (a prompt group is one request, so that it can be aborted as one)."""

    id: str
    """Not that of another running request."""
    prompt_tokens: np.ndarray
    sampling: SamplingParams
    n: int = 1
    seed: int | None = None
    """Response i is drawn with seed + i where the engine honours seeds (the reference engine does)."""
    routing: RoutingShape | None = None
    """Set: the experts that each token was sent to come back with the responses."""


@dataclass(slots=True)
class Generation:
    """One response. Arrays are [response]; a stop token that was sampled is part of the response."""

    tokens: np.ndarray
    logprobs: np.ndarray
    weight_versions: np.ndarray
    finish_reason: FinishReason
    routed_experts: np.ndarray | None = None
    """As ``Sample.routed_experts``, where the request asked; None all the same for one that ended before it began."""


class Engine(Protocol):
    """A running engine process, seen from outside. Every call raises :class:`EngineError`."""

    url: str

    def generate(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        """All requests, concurrently; result i holds the ``n`` generations of request i."""

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Log-probs [len - 1] of each sequence's tokens given their prefix, at temperature 1 (the sync's probe)."""

    def pause(self) -> None:
        """Stop decoding; running requests keep their tokens and continue under whatever weights come next."""

    def resume(self) -> None: ...

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        """Load an HF-format folder; from then on generated tokens carry ``version``. Atomic: all or nothing."""

    def weight_version(self) -> int: ...

    def abort(self, request_id: str | None = None) -> None:
        """End one request, or all; they return what they have, with finish_reason ``abort``."""

    def healthy(self) -> bool: ...

    def shutdown(self) -> None:
        """End the process and its children; returns when none is left."""
