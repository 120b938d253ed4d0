"""What an objective is given, and what it returns. Tensors and a process group; nothing else of this project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

Metric = tuple[torch.Tensor, torch.Tensor]
"""(sum, denominator), both 0-d float tensors of this rank's share: add both over any split, divide once."""


@dataclass(slots=True)
class ObjectiveInputs:
    """This rank's tokens of one micro-batch, packed into one dimension.

    ``T`` is the number of tokens on this rank (a shard, under context parallelism), ``S`` the number of responses of
    the whole micro-batch; every context-parallel rank gives the same ``S``.
    """

    logprobs: torch.Tensor
    """[T] float, with grad: log pi, the trainer's now."""
    old_logprobs: torch.Tensor
    """[T] float: log pi_old, the trainer's at the weight version that sampled."""
    rollout_logprobs: torch.Tensor
    """[T] float: log mu, the engine's."""
    mask: torch.Tensor
    """[T] bool: tokens that count."""
    segment_ids: torch.Tensor
    """[T] int64 in [0, S): which response a token belongs to (any value where the mask is False)."""
    advantages: torch.Tensor
    """[S] float."""
    num_segments: int
    total_tokens: float
    """Masked-in tokens of the whole mini-batch, over all data-parallel and context-parallel ranks and micro-batches."""
    total_sequences: float
    """Responses of the whole mini-batch, likewise."""
    cp_group: dist.ProcessGroup | None = None
    """The context-parallel group the tokens are sharded over; None: not sharded."""


@dataclass(slots=True)
class ObjectiveOutput:
    """``loss`` is this rank's share: its sum over CP and DP ranks and micro-batches is the mini-batch's loss, once."""

    loss: torch.Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)


Objective = Callable[[ObjectiveInputs], ObjectiveOutput]
