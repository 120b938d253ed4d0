"""The records everyone passes on: a prompt, one sampled response, and where each token came from.

Token arrays are numpy (int32 / float32), so that a record is compact in memory, on disk and in Ray's object store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """How a mixture-of-experts model routes: the last two axes of ``Sample.routed_experts``, and their type."""

    layers: int
    """Layers of the model, dense ones too."""
    moe_layers: tuple[int, ...]
    """Those that route, counted from 0."""
    topk: int
    """Experts a token is sent to in each."""
    experts: int
    """Routed experts of each."""

    @property
    def dtype(self) -> np.dtype:
        """The narrowest that holds every expert's number (and that torch can index and save: uint16 is not)."""
        return np.dtype(np.uint8 if self.experts <= 256 else np.int16)


@dataclass(slots=True)
class Prompt:
    """One problem, rendered and tokenised once, when the data file is read."""

    id: str
    """Stable across runs: the row's own ``id`` or ``<file stem>:<line number>``."""
    tokens: np.ndarray
    """[prompt] int32."""
    text: str
    """The rendered prompt, exactly what was tokenised."""
    answer: str
    """The gold answer, as published."""
    source: str = ""
    reward: str = ""
    """Label of the reward that the row names (data.reward_field); empty: none."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Sample:
    """One response of a prompt group. Response arrays are aligned: index t is response token t."""

    id: str
    """``<rollout batch>/<prompt id>/<index in the group>``."""
    prompt: Prompt
    response_tokens: np.ndarray
    """[response] int32, the engine's own token ids (never retokenised)."""
    rollout_logprobs: np.ndarray
    """[response] float32: log mu, the engine's log-prob of each token when it was sampled."""
    weight_versions: np.ndarray
    """[response] int32: the weight version that sampled each token."""
    loss_mask: np.ndarray
    """[response] bool: True where the policy chose the token (False for tool output and the like)."""
    finish_reason: FinishReason
    text: str = ""
    """The decoded response."""
    grade: float | None = None
    """What the reward function said."""
    reward: float | None = None
    """The grade less the penalties; what advantages are made of."""
    advantage: float | None = None
    old_logprobs: np.ndarray | None = None
    """[response] float32: log pi_old, the trainer's own log-prob at the version that sampled."""
    train_logprobs: np.ndarray | None = None
    """[response] float32: log pi, the trainer's log-prob in the forward pass of the update it was trained by."""
    trained_version: int | None = None
    """The weight version that this update began from; the samples of one mini-batch share it."""
    routed_experts: np.ndarray | None = None
    """[prompt + response - 1, MoE layers, topk] of RoutingShape.dtype, where the engine was asked for them: row t holds
    the experts that token t was sent to, in the engine's own order. The last token was sampled and went nowhere; what
    an environment says after the policy's last token has no rows either."""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> int:
        """Its index in the group."""
        return int(self.id.rpartition("/")[2])

    @property
    def length(self) -> int:
        """Prompt plus response, in tokens."""
        return len(self.prompt.tokens) + len(self.response_tokens)
