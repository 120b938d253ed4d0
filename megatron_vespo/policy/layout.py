"""How the ranks are divided among tensor, pipeline, context, expert and data parallelism.

Plain arithmetic: the driver and ``plan`` use it without megatron-core. ranks.py makes a layout's process groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_vespo.config.schema import ParallelConfig


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of every kind of parallelism over ``world_size`` ranks."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    virtual_pipeline: int | None = None
    """Model chunks a pipeline rank holds; None: one, the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel ranks."""

    def __post_init__(self) -> None:
        ranks = self.tensor * self.pipeline * self.context
        if self.world_size % ranks:
            raise ValueError(
                f"parallel.tensor x parallel.pipeline x parallel.context = {self.tensor} x {self.pipeline} x "
                f"{self.context} = {ranks} does not divide the {self.world_size} ranks "
                "(cluster.nodes x cluster.ranks_per_node)"
            )
        expert_ranks = self.expert * self.expert_tensor * self.pipeline
        if self.world_size % expert_ranks:
            raise ValueError(
                f"parallel.expert x parallel.expert_tensor x parallel.pipeline = {self.expert} x {self.expert_tensor} "
                f"x {self.pipeline} = {expert_ranks} does not divide the {self.world_size} ranks"
            )
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline of at least 2; it is 1"
            )

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int, num_experts: int = 0) -> ParallelLayout:
        """Resolves ``expert: auto`` to the largest size that divides both the experts and the ranks of a pipeline
        stage (per ``expert_tensor`` group), and turns sequence parallelism on for an MoE under tensor parallelism,
        which megatron-core cannot train without it.

        ``num_experts`` is 0 for a dense model. Raises ValueError naming the fields that do not fit.
        """
        if not num_experts and parallel.expert not in (1, "auto"):
            raise ValueError(f"parallel.expert = {parallel.expert}, but the model has no experts; leave it at auto")
        expert, expert_tensor = 1, parallel.expert_tensor if num_experts else 1
        if parallel.expert != "auto":
            expert = parallel.expert
        elif num_experts:
            expert = math.gcd(num_experts, max(1, world_size // (parallel.pipeline * expert_tensor)))
        return cls(
            world_size=world_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            context=parallel.context,
            expert=expert,
            expert_tensor=expert_tensor,
            virtual_pipeline=parallel.virtual_pipeline,
            sequence=parallel.tensor > 1 and (parallel.sequence or num_experts > 0),
        )

    @property
    def megatron_sizes(self) -> dict[str, int | None]:
        """The sizes by the names that megatron-core's process groups and model config share."""
        return dict(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual_pipeline,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
        )

    @property
    def data(self) -> int:
        """Data-parallel size: ranks that see different sequences."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def sequence_multiple(self) -> int:
        """Each packed sequence's length must be a multiple of this (pad it): the zigzag cuts it in 2 x context."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        """A packed row's total length must be a multiple of this: sequence parallelism cuts each CP shard evenly."""
        return self.context * (self.tensor if self.sequence else 1)


def local_indices(cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Which tokens of a packed row belong to one context-parallel rank, in the order it holds them.

    Each sequence is cut into ``2 * cp_size`` equal chunks, and rank r holds chunks r and ``2 * cp_size - 1 - r`` of it
    (zigzag: every rank gets the same share of a causal mask); Transformer Engine's and megatron-core's own convention.

    ``cu_seqlens``: [sequences + 1] int, starting at 0. Returns [T / cp_size] int64, T = cu_seqlens[-1].
    Raises ValueError for a sequence whose length is not a multiple of ``2 * cp_size``.
    """
    total = int(cu_seqlens[-1])
    if cp_size == 1:
        return torch.arange(total)
    starts = cu_seqlens[:-1].to(torch.int64).cpu()
    lengths = cu_seqlens[1:].to(torch.int64).cpu() - starts
    uneven = torch.nonzero(lengths % (2 * cp_size)).flatten()
    if len(uneven):
        first = int(uneven[0])
        raise ValueError(
            f"sequence {first} of the packed row has {int(lengths[first])} tokens; under context parallelism "
            f"{cp_size} each sequence must be padded to a multiple of {2 * cp_size} (ParallelLayout.sequence_multiple)"
        )
    chunks = lengths // (2 * cp_size)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), 2 * chunks)
    offset = torch.arange(len(sequence)) - torch.repeat_interleave(starts // cp_size, 2 * chunks)
    chunk = chunks[sequence]
    position = torch.where(offset < chunk, cp_rank * chunk + offset, (2 * cp_size - 2 - cp_rank) * chunk + offset)
    return starts[sequence] + position
