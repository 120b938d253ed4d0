"""The parameters of a live Megatron model, each with its place in the whole model and in the HF checkpoint.

Buffers that a checkpoint of Megatron's would hold count as parameters here: the routers' expert biases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedConfig

from megatron_vespo.weights.mapping import (
    EMBEDDING,
    OUTPUT,
    Dimensions,
    Piece,
    Rule,
    Shape,
    WeightsError,
    family,
    template,
)


@dataclass(frozen=True, slots=True)
class LocatedParameter:
    """One parameter that this rank holds. ``layer`` and ``expert`` count over the whole model."""

    name: str
    """Its name in the model chunk, for messages."""
    key: str
    """Its key in the family's table."""
    rule: Rule
    layer: int | None
    expert: int | None
    tensor: torch.Tensor
    """This rank's shard: the live parameter, without grad."""
    tied_copy: bool
    """The copy of the input embedding that the last pipeline stage keeps as its output layer."""
    group: dist.ProcessGroup | None
    """The ranks that hold its shards; None where each holds the whole."""
    sizes: Dimensions

    @property
    def dim(self) -> int:
        """The dimension along which it is sharded and its pieces are laid."""
        return self.rule.layout.dim

    @property
    def shape(self) -> Shape:
        """Of this rank's shard, as of every other."""
        return tuple(self.tensor.shape)

    @property
    def rank(self) -> int:
        return self.group.rank() if self.group else 0

    @property
    def shards(self) -> int:
        return self.group.size() if self.group else 1

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.rule.names(self.layer, self.expert)

    def hf_shapes(self) -> list[Shape]:
        return self.rule.layout.hf_shapes(self.shape, self.shards, self.sizes)

    def pieces(self, rank: int) -> list[Piece]:
        return self.rule.layout.pieces(rank, self.shape, self.shards, self.sizes)


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside megatron-core's wrappers (DistributedDataParallel, Float16Module)."""
    while not isinstance(model, GPTModel):
        model = model.get_submodule("module")
    return model


def locate_parameters(models: Sequence[torch.nn.Module], hf_config: PreTrainedConfig) -> list[LocatedParameter]:
    """All parameters of this rank's model chunks (one a virtual pipeline stage, wrapped or not).

    Raises WeightsError naming the parameters that the family's table does not know, and those whose shape is not
    what config.json makes of them.
    """
    table, config = family(hf_config.model_type), unwrap(models[0]).config
    sizes = Dimensions(hf_config.vocab_size, config.num_attention_heads, config.num_query_groups, config.kv_channels)
    located, unknown = [], []
    for wrapped in models:
        model = unwrap(wrapped)
        for name, parameter in itertools.chain(model.named_parameters(), _persistent_buffers(model)):
            key, layer, expert = template(name)
            tied_copy = key == OUTPUT and model.share_embeddings_and_output_weights
            rule = table.get(EMBEDDING if tied_copy else key)
            if rule is None:
                unknown.append(name)
                continue
            if layer is not None:
                layer = model.decoder.layers[layer].layer_number - 1
            if expert is not None:
                expert += _first_expert(model)
            group = _shard_group(rule, of_expert=expert is not None)
            located.append(
                LocatedParameter(name, key, rule, layer, expert, parameter.detach(), tied_copy, group, sizes)
            )
    if unknown:
        raise WeightsError(f"no rule of the family {hf_config.model_type!r} for the Megatron parameters {unknown}")
    for located_parameter in located:
        _check_shard(located_parameter)
    return located


def _persistent_buffers(model: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _shard_group(rule: Rule, *, of_expert: bool) -> dist.ProcessGroup | None:
    if not rule.layout.sharded:
        return None
    if of_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _first_expert(model: GPTModel) -> int:
    experts = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    return experts * parallel_state.get_expert_model_parallel_rank()


def _check_shard(parameter: LocatedParameter) -> None:
    """The pieces of all ranks must cover the HF tensors once, and fit into the shards."""
    lengths = [sum(p.stop - p.start for p in parameter.pieces(rank)) for rank in range(parameter.shards)]
    whole = sum(shape[parameter.dim] for shape in parameter.hf_shapes())
    if sum(lengths) != whole or max(lengths) > parameter.shape[parameter.dim]:
        raise WeightsError(
            f"Megatron parameter {parameter.name} has shape {list(parameter.shape)} on each of {parameter.shards} "
            f"ranks, which does not fit {parameter.hf_names} of a model with {parameter.sizes}"
        )
