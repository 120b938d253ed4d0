"""A live Megatron model as Hugging Face tensors: a stream of whole tensors on rank 0, one parameter at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PreTrainedConfig

from megatron_vespo.weights.mapping import EMBEDDING, Dimensions, Piece, Rule, Shape, family
from megatron_vespo.weights.parameters import LocatedParameter, locate_parameters, unwrap


@dataclass(frozen=True, slots=True)
class _Entry:
    """One parameter of the whole model, as every rank of its pipeline knows it."""

    key: str
    layer: int | None
    expert: int | None
    shape: Shape
    dtype: torch.dtype
    shards: int
    stage: int
    """Pipeline rank that holds it."""
    holder: int
    """Expert-parallel rank that holds it; 0 for what is not an expert's."""


@torch.no_grad()
def export_hf(models: Sequence[torch.nn.Module], hf_config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields ``(HF name, whole tensor)`` on rank 0 of the world, in a fixed order, in the parameters' dtype and device.

    Collective: every rank must iterate to the end, though the others are given nothing. Beside its own parameters a
    rank holds one whole parameter at a time (rank 0 twice: as Megatron lays it out, and as HF does). What is yielded
    may be a view of a live parameter: copy it to keep it. ``models``: this rank's chunks, one a virtual pipeline
    stage, wrapped or not. Under the distributed optimizer the parameters must be gathered (they are, after its
    ``step``, unless overlap_param_gather puts that off).
    """
    mine = {
        (p.key, p.layer, p.expert): p
        for p in locate_parameters(models, hf_config)
        if not p.tied_copy  # the first stage has the original
    }
    table = family(hf_config.model_type)
    layers = unwrap(models[0]).config.num_layers
    some = next(iter(mine.values()))
    for entry in _schedule(mine, list(table), layers):
        whole = _gather(entry, mine.get((entry.key, entry.layer, entry.expert)), some.tensor.device)
        if whole is not None:
            rule = table[entry.key]
            yield from zip(rule.names(entry.layer, entry.expert), _split(whole, entry, rule, some.sizes), strict=True)
        del whole  # before the next is made


def _schedule(mine: dict[Any, LocatedParameter], keys: list[str], layers: int) -> list[_Entry]:
    """Every parameter of the model in the order of export, the same on all ranks."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    holders = parallel_state.get_expert_model_parallel_world_size()
    experts_here = len({p.expert for p in mine.values() if p.expert is not None})
    local = []
    for parameter in mine.values():
        entry = _Entry(
            key=parameter.key,
            layer=parameter.layer,
            expert=parameter.expert,
            shape=parameter.shape,
            dtype=parameter.tensor.dtype,
            shards=parameter.shards,
            stage=stage,
            holder=0,
        )
        if parameter.expert is None:
            local.append(entry)
        else:  # expert-parallel peers hold the same parameters, of other experts
            index = parameter.expert % experts_here
            local += [replace(entry, expert=index + experts_here * h, holder=h) for h in range(holders)]
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, local, group=parallel_state.get_pipeline_model_parallel_group())

    def position(entry: _Entry) -> tuple[int, int, int]:
        outside = -1 if entry.key == EMBEDDING else layers
        layer = outside if entry.layer is None else entry.layer
        return layer, keys.index(entry.key), entry.expert or 0

    return sorted(itertools.chain.from_iterable(stages), key=position)


def _gather(entry: _Entry, parameter: LocatedParameter | None, device: torch.device) -> torch.Tensor | None:
    """[shards, *shard] on rank 0 of the world, else None. Collective over the ranks that :func:`_takes_part` names."""
    of_expert = entry.expert is not None
    if not _takes_part(of_expert):
        return None
    here = entry.stage == parallel_state.get_pipeline_model_parallel_rank()
    whole: torch.Tensor | None = None
    if parameter is not None:
        whole = _gather_shards(parameter)
        if whole is None:
            return None  # the first of the shards' ranks goes on with them

    if of_expert and here:
        if parallel_state.get_expert_tensor_parallel_rank() != 0:
            return None
        whole = _to_first(whole, entry, entry.holder, parallel_state.get_expert_model_parallel_group(), device)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_process_group_ranks(pipeline)[0] != 0:
        return None
    whole = _to_first(whole, entry, entry.stage, pipeline, device)
    return whole if dist.get_rank() == 0 else None


def _to_first(
    whole: torch.Tensor | None, entry: _Entry, source: int, group: dist.ProcessGroup, device: torch.device
) -> torch.Tensor | None:
    """``whole`` of the group's rank ``source`` on its rank 0, None on the others. Collective over the group.

    An all-to-all in which only these two exchange anything: on NCCL it uses the group's own communicator, where a send
    would open one for the pair.
    """
    if source == 0:
        return whole
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    moved = entry.shards * torch.Size(entry.shape).numel() * entry.dtype.itemsize
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    outgoing, incoming = nothing, nothing
    if rank == source:
        assert whole is not None
        outgoing = whole.contiguous().view(-1).view(torch.uint8)
    if rank == 0:
        incoming = torch.empty(moved, dtype=torch.uint8, device=device)
    to = [len(outgoing) if peer == 0 else 0 for peer in range(size)]
    from_ = [len(incoming) if peer == source else 0 for peer in range(size)]
    dist.all_to_all_single(incoming, outgoing, from_, to, group=group)
    return incoming.view(entry.dtype).view(entry.shards, *entry.shape) if rank == 0 else None


def _takes_part(of_expert: bool) -> bool:
    """One data-parallel replica is enough: the one that rank 0 of the world belongs to."""
    if of_expert:
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _gather_shards(parameter: LocatedParameter) -> torch.Tensor | None:
    """[shards, *shard] on the first rank of the shards' group, None on the others."""
    if parameter.group is None or parameter.shards == 1:
        return parameter.tensor[None]
    shard = parameter.tensor.contiguous()
    if parameter.rank != 0:
        dist.gather(shard, None, group=parameter.group, group_dst=0)
        return None
    whole = shard.new_empty(parameter.shards, *shard.shape)
    dist.gather(shard, list(whole.unbind()), group=parameter.group, group_dst=0)
    return whole


def _split(whole: torch.Tensor, entry: _Entry, rule: Rule, sizes: Dimensions) -> list[torch.Tensor]:
    """The HF tensors that lie in the shards ``whole`` [shards, *shard]."""
    layout = rule.layout
    pieces = [
        (rank, offset, piece)
        for rank in range(entry.shards)
        for offset, piece in _with_offsets(layout.pieces(rank, entry.shape, entry.shards, sizes))
    ]
    tensors = []
    for source, shape in enumerate(layout.hf_shapes(entry.shape, entry.shards, sizes)):
        parts = [
            (piece.start, whole[rank].narrow(layout.dim, offset, piece.stop - piece.start))
            for rank, offset, piece in pieces
            if piece.source == source
        ]
        parts.sort(key=lambda part: part[0])
        tensor = parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts], layout.dim)
        assert tuple(tensor.shape) == shape, (entry, shape, tensor.shape)
        tensors.append(tensor)
    return tensors


def _with_offsets(pieces: list[Piece]) -> Iterator[tuple[int, Piece]]:
    """Each piece with where it starts in the shard."""
    offset = 0
    for piece in pieces:
        yield offset, piece
        offset += piece.stop - piece.start
