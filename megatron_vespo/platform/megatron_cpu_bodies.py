"""Bodies that megatron_cpu.py gives to functions of megatron-core.

Only a body's code moves: it runs with the globals of the megatron-core module that it is put into. So each imports
what it uses, and calls nothing else of this file.
"""

from __future__ import annotations

from typing import Any

import torch


def get_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    import torch

    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    import torch

    torch.set_rng_state(new_state)


def get_pos_emb_on_this_cp_rank(
    pos_emb: torch.Tensor, seq_dim: int, cp_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    import torch

    size, rank = cp_group.size(), cp_group.rank()
    chunks = pos_emb.chunk(2 * size, seq_dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], seq_dim)


def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def maybe_dtoh_and_synchronize(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
    import torch

    if not self.drop_and_pad and point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(self, name)
            setattr(self, name, splits.numpy() if torch.is_tensor(splits) else splits)
    return tokens_per_expert


def gather_along_first_dim(
    input_: torch.Tensor,
    group: torch.distributed.ProcessGroup,
    output_split_sizes: Any = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    import torch

    world_size = group.size()
    if world_size == 1:
        return input_
    rows = [int(n) for n in output_split_sizes] if output_split_sizes is not None else [len(input_)] * world_size
    most = max(rows)
    padded = input_.contiguous()
    if len(input_) < most:
        padded = torch.cat([padded, padded.new_zeros((most - len(input_), *input_.shape[1:]))])
    gathered = padded.new_empty((most * world_size, *input_.shape[1:]))
    torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
    if min(rows) == most:
        return gathered
    return torch.cat([part[:n] for part, n in zip(gathered.split(most), rows, strict=True)])
