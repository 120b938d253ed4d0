"""The gradients of several objectives on the same mini-batch, through the real policy: their inner products over all
parameters of the model, each counted once whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_vespo.objectives.build import ComposedObjective
from megatron_vespo.policy import ranks
from megatron_vespo.policy.step import LogprobHead, objective_loss, run_micro_batches, search_bounds
from megatron_vespo.samples.packing import PackedBatch

COLUMNS_AT_ONCE = 1 << 20
"""How many columns of the gradients are in float64 at a time."""


def gradient_products(
    objectives: Sequence[ComposedObjective],
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
    head: LogprobHead,
    totals: dict[str, float],
) -> torch.Tensor:
    """[K, K] float64, the same on every rank: inner products of the K objectives' gradients at the current weights.

    Collective. Of the objective alone: what a run adds to its loss besides (router losses) is left out, and tokens go
    where the live routers send them (no routing replay). Each objective
    takes a forward and a backward pass over ``batches`` (this rank's shards), and a forward pass more where it
    searches its bounds. All K gradients are held in host memory, in float32: 4 K bytes a parameter, each parameter on
    one rank.
    """
    owned = [part for chunk in chunks for part in owned_gradients(chunk)]
    sizes = [len(part) for part in owned]
    rows = torch.empty(len(objectives), sum(sizes), dtype=torch.float32)
    for row, objective in zip(rows, objectives, strict=True):
        if objective.needs_preparation:
            objective = search_bounds(objective, chunks, batches, head, totals)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        run_micro_batches(chunks, batches, head, objective_loss(objective, totals), forward_only=False)
        for place, part in zip(row.split(sizes), owned, strict=True):
            place.copy_(part)
    products = torch.zeros(len(objectives), len(objectives), dtype=torch.float64)
    for columns in rows.split(COLUMNS_AT_ONCE, dim=1):
        wide = columns.double()
        products += wide @ wide.T
    products = products.to(batches[0].tokens.device)
    dist.all_reduce(products)
    return products.cpu()


def owned_gradients(chunk: DistributedDataParallel) -> Iterator[torch.Tensor]:
    """Views [n] into the gradient buffers: over all ranks, they hold each parameter of the model once.

    Of the ranks with the same parameters each takes its part of every bucket, as the distributed optimizer does: after
    its reduce-scatter the other parts are not the sums. Of the rest, the tensor-parallel copies (norms, router) are
    the first rank's, and a tied output layer on a pipeline stage of its own is the embedding's.
    """
    buffers: list[tuple[Any, bool]] = [(buffer, False) for buffer in chunk.buffers]
    buffers += [(buffer, True) for buffer in chunk.expert_parallel_buffers]
    for buffer, of_experts in buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel()
            first, end = (bucket.offset + size * rank // group.size() for rank in (group.rank(), group.rank() + 1))
            for parameter in bucket.params_list:
                # An expert's copies are all in the buffer's group, tensor-parallel ranks included (and Transformer
                # Engine does not mark its shards as tensor-parallel).
                if not (of_experts or param_is_not_tensor_parallel_duplicate(parameter, ranks.tp_group())):
                    continue
                start, stop, _ = buffer.param_index_map[parameter]
                start, stop = max(start, first), min(stop, end)
                if start < stop and param_is_not_shared(parameter):
                    yield buffer.grad_data[start:stop]
