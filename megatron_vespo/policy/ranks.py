"""This rank and its process groups: megatron-core's ``parallel_state``, which ``initialize`` sets up for a layout."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_vespo import platform
from megatron_vespo.policy.layout import ParallelLayout


def initialize(layout: ParallelLayout, seed: int) -> None:
    """Creates megatron-core's process groups for ``layout`` and seeds its generators.

    torch.distributed must be initialised with ``layout.world_size`` ranks, and platform.prepare_megatron called.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call init_process_group before policy.ranks")
    if dist.get_world_size() != layout.world_size:
        raise ValueError(f"the layout is for {layout.world_size} ranks, and {dist.get_world_size()} are running")
    destroy()
    parallel_state.initialize_model_parallel(
        **layout.megatron_sizes,
        create_gloo_process_groups=False,  # each costs threads, and nothing of ours asks for them
    )
    platform.current().seed(seed)


def destroy() -> None:
    """Ends megatron-core's process groups (it only forgets them, and their threads stay); the world group stays."""
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the world
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def dp_rank() -> int:
    """Which share of the sequences is this rank's, in [0, layout.data)."""
    return parallel_state.get_data_parallel_rank()


def dp_group() -> dist.ProcessGroup:
    """Ranks that see different sequences and hold the same shard of model and sequence."""
    return parallel_state.get_data_parallel_group()


def dp_cp_group() -> dist.ProcessGroup:
    """dp_group times cp_group: ranks over which every token of a mini-batch is held once."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def cp_rank() -> int:
    return parallel_state.get_context_parallel_rank()


def cp_group() -> dist.ProcessGroup | None:
    """The ranks that share each sequence; None where sequences are not sharded."""
    return parallel_state.get_context_parallel_group() if parallel_state.get_context_parallel_world_size() > 1 else None


def tp_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def tp_group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def pp_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def pp_group() -> dist.ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def is_last_stage() -> bool:
    """Whether this rank holds the pipeline's last chunk (the output layer), so that it sees logits and the loss."""
    return pp_rank() == dist.get_world_size(pp_group()) - 1
