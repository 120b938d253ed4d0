"""What the rest of the stack may ask of a rollout engine. SGLang and the reference engine both answer it.

Tokens in, tokens out: an engine never sees text, and nothing is ever retokenised.

Log-probs: those of the sampled tokens under softmax(logits / temperature), **before** top-k and top-p cut it. With
top_k = -1 and top_p = 1 that is the distribution that was sampled. With either on, the token was drawn from the cut and
renormalised distribution, whose log-prob is larger by -log(mass kept) and is not reported by either engine: a ratio
pi/mu of such tokens compares the trainer's uncut distribution with the engine's uncut one. Temperature 0 draws the most
likely token, and its log-prob is the one at temperature 1.

Seeds: a draw is a function of (seed, place of the token in prompt + response) and of the distribution, so that a
response that is cut and continued with its seed is drawn as if it had never been cut (continuation.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from megatron_vespo.samples.records import FinishReason, RoutingShape


class EngineError(RuntimeError):
    """An engine refused, died or hung. The message names the engine's address and what was asked of it."""


class EngineDown(EngineError):
    """It died, hangs or cannot be reached: another engine, or this one started again, may do what was asked."""


PauseMode = Literal["abort", "retract", "in_place"]
"""What becomes of the responses under way when an engine is paused; new ones wait until it resumes.

abort     They end at once with finish_reason ``abort`` and what they have. They hold no place and no cache in the
          engine; whoever asked may continue them, here or on another engine.
retract   They wait, and on resume their keys and values are computed anew. Each token is exactly of the weights whose
          version it carries.
in_place  They wait and keep keys and values of the old weights. Nothing is computed twice, but tokens sampled after new
          weights came attend to keys of the old ones: **their log-probs match neither model**, though they carry the
          new version. The same holds for later requests that share a cached prefix, until an update outside of this
          mode flushes the cache. Not for training with importance weights that one means to trust.
"""


MemoryPart = Literal["weights", "kv_cache"]
"""Of an engine: what it may be told to give up for a while. SGLang's tags."""
ALL_MEMORY: frozenset[MemoryPart] = frozenset(("weights", "kv_cache"))


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
    """Response i is drawn with seed + i where the engine honours seeds (the reference engine does; SGLang with
    --enable-deterministic-inference, on a GPU)."""
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
    retries: tuple[str, ...] = ()
    """Why it was asked for again, each time that it was: the engine died, hung, or took too long."""


class Engine(Protocol):
    """A running engine process, seen from outside. Every call raises :class:`EngineError`."""

    url: str

    async def answer(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        """All requests in one call, however long it takes; result i holds the ``n`` generations of request i."""

    async def ping(self) -> None:
        """Return when the part that computes has answered, which it does between two steps, busy or paused as it may
        be. Raises EngineDown where it is dead; waits for ever where it hangs."""

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Log-probs [len - 1] of each sequence's tokens given their prefix, at temperature 1 (the sync's probe)."""

    def pause(self, mode: PauseMode = "retract") -> None:
        """Stop decoding; what becomes of running requests is the mode's to say."""

    def resume(self) -> None: ...

    def hold(self, parts: frozenset[MemoryPart]) -> None:
        """Keep only these parts of its memory, and take back those that it gave up; needs a pause. Its weights come
        back as they were, its KV cache empty. It can take new weights while it holds ``weights`` alone."""

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        """Load an HF-format folder; from then on generated tokens carry ``version``. Atomic: all or nothing."""

    def weight_version(self) -> int: ...

    def abort(self, request_id: str | None = None) -> None:
        """End one request, or all; they return what they have, with finish_reason ``abort``."""

    def healthy(self) -> bool: ...

    def shutdown(self) -> None:
        """End the process and its children; returns when none is left."""
