"""What an objective is given, and what it returns. Tensors and a process group; nothing else of this project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

Metric = tuple[torch.Tensor, torch.Tensor]
"""(sum, denominator), both 0-d float64 tensors of this rank's share: add both over any split, divide once."""


@dataclass(slots=True)
class ObjectiveInputs:
    """This rank's tokens of one micro-batch, packed into one dimension.

    ``T`` is the number of tokens on this rank (a shard, under context parallelism), ``S`` the number of responses of
    the whole micro-batch; every context-parallel rank gives the same ``S`` and the same ``advantages``. A response may
    lie on any subset of the ranks, and a rank may hold no token at all. Raises ValueError on shapes and dtypes that
    do not fit together.
    """

    logprobs: torch.Tensor
    """[T] float, with grad: log pi, the trainer's now (nats, at the sampling temperature)."""
    old_logprobs: torch.Tensor
    """[T] float: log pi_old, the trainer's at the weight version that sampled."""
    rollout_logprobs: torch.Tensor
    """[T] float: log mu, the engine's."""
    mask: torch.Tensor
    """[T] bool: tokens that count. Where it is False, every other field may hold anything, NaN included."""
    segment_ids: torch.Tensor
    """[T] int64 in [0, S): which response a token belongs to (any value where the mask is False)."""
    advantages: torch.Tensor
    """[S] float."""
    num_segments: int
    total_tokens: float
    """Masked-in tokens of the whole mini-batch, over all data-parallel and context-parallel ranks and micro-batches."""
    total_sequences: float
    """Responses of the whole mini-batch, likewise (each once, however many context-parallel ranks share it)."""
    cp_group: dist.ProcessGroup | None = None
    """The context-parallel group the tokens are sharded over; None: not sharded."""

    def __post_init__(self) -> None:
        if self.logprobs.dim() != 1:
            raise ValueError(f"logprobs must be packed into one dimension [T], got shape {list(self.logprobs.shape)}")
        for name in ("old_logprobs", "rollout_logprobs", "mask", "segment_ids"):
            shape = getattr(self, name).shape
            if shape != self.logprobs.shape:
                raise ValueError(f"{name} has shape {list(shape)}, logprobs {list(self.logprobs.shape)}: one per token")
        for name in ("logprobs", "old_logprobs", "rollout_logprobs", "advantages"):
            if not getattr(self, name).is_floating_point():
                raise ValueError(f"{name} must be a float tensor, got {getattr(self, name).dtype}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be a bool tensor, got {self.mask.dtype}; use mask.bool()")
        if self.segment_ids.dtype != torch.int64:
            raise ValueError(f"segment_ids must be an int64 tensor, got {self.segment_ids.dtype}; use .long()")
        if self.advantages.shape != (self.num_segments,):
            raise ValueError(
                f"advantages has shape {list(self.advantages.shape)}, num_segments is {self.num_segments}: "
                "one per response"
            )
        if not (self.total_tokens > 0 and self.total_sequences > 0):
            raise ValueError(
                f"total_tokens={self.total_tokens} and total_sequences={self.total_sequences} are the mini-batch's "
                "denominators and must be positive; skip the update of a mini-batch in which no token counts"
            )


@dataclass(slots=True)
class ObjectiveOutput:
    """``loss`` is this rank's share: its sum over CP and DP ranks and micro-batches is the mini-batch's loss, once.

    So are the gradients: summed (not averaged) over the same, they are the mini-batch's gradient. Of each metric,
    too, a rank returns only its share, see metrics.py.
    """

    loss: torch.Tensor
    """0-d float64; always connected to ``logprobs``, also when no token counts (it is 0 then, and so its gradient)."""
    metrics: dict[str, Metric] = field(default_factory=dict)


Objective = Callable[[ObjectiveInputs], ObjectiveOutput]
