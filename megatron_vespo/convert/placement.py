"""Where each Hugging Face tensor lies in a Megatron distributed checkpoint of the same model.

Asked of the model itself, built on the meta device for one rank, where no tensor has memory: its ``sharded_state_dict``
tells keys and shapes of the checkpoint, and the family's table which HF rows lie where in a parameter. So a family that
the trainer knows is one that the converter knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy import ranks
from megatron_vespo.policy.checkpoint import sharded_weights
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.model import PolicyModel, build_model
from megatron_vespo.weights.mapping import OUTPUT, Shape, WeightsError, family
from megatron_vespo.weights.parameters import LocatedParameter, locate_parameters


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor of the checkpoint that belong to one layer and expert."""

    key: str
    whole: Shape
    """Shape of the checkpoint's tensor, all layers and experts."""
    offset: Shape
    """Of the part's first element in it."""
    shape: Shape
    """1 along the axes that count layers and experts; then rows and the rest."""
    axis: int
    """Of the rows."""

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class Run:
    """Rows ``start:stop`` of an HF tensor, which are the rows from ``row`` on of a part."""

    start: int
    stop: int
    part: Part
    row: int


@dataclass(frozen=True, slots=True)
class Placed:
    """One HF tensor; ``runs`` cover its rows once, in order."""

    shape: Shape
    runs: tuple[Run, ...]
    parameter: str
    """The Megatron parameter that holds it, for messages."""


@dataclass(frozen=True, slots=True)
class Placement:
    tensors: dict[str, Placed]
    """HF name -> where it lies, in the order of the model."""
    parts: tuple[Part, ...]
    objects: tuple[str, ...]
    """Keys of what a checkpoint of the model holds beside tensors: empty extra states of the layers."""
    tied: tuple[str, str] | None
    """(output layer, embedding) by their HF names, where config.json ties them: the checkpoint has only the latter."""


def place(hf_config: PreTrainedConfig) -> Placement:
    """Raises WeightsError or ValueError for a model that the trainer does not know."""
    with one_rank(), _OnMeta():
        [model] = build_model(hf_config, ModelConfig(path=Path("."), layer_spec="local"), ParallelLayout())
        state = sharded_weights(model)
        located = locate_parameters([model], hf_config)
    tensors: dict[str, Placed] = {}
    parts: list[Part] = []
    for parameter in located:
        mine = list(_parts(parameter, state[parameter.name]))
        parts += [part for part, _ in mine]
        tensors |= _placed(parameter, mine)
    objects = [value.unique_key for value in nested_values(state) if isinstance(value, ShardedObject)]
    return Placement(tensors, tuple(parts), tuple(objects), _tied(model, hf_config, located))


def _tied(model: PolicyModel, hf_config: PreTrainedConfig, located: list[LocatedParameter]) -> tuple[str, str] | None:
    if not model.share_embeddings_and_output_weights:
        return None
    [embedding] = [parameter for parameter in located if parameter.key == "embedding.word_embeddings.weight"]
    return family(hf_config.model_type)[OUTPUT].hf[0], embedding.hf_names[0]


def _parts(parameter: LocatedParameter, state: Any) -> Iterator[tuple[Part, int]]:
    """The parts of a parameter, each with its first row in it."""
    row_elements = math.prod(parameter.shape[1:])
    for sharded in nested_values(state.build() if isinstance(state, ShardedTensorFactory) else {"": state}):
        assert isinstance(sharded, ShardedTensor)
        data, axis = sharded.data, sharded.prepend_axis_num
        first, rest = divmod(data.storage_offset(), row_elements)
        if not data.is_contiguous() or rest or tuple(data.shape[1:]) != parameter.shape[1:]:
            raise WeightsError(f"{sharded.key}: not whole rows of the Megatron parameter {parameter.name}")
        shape = (*[1] * axis, *data.shape)
        yield Part(sharded.key, tuple(sharded.global_shape), tuple(sharded.global_offset), shape, axis), first


def _placed(parameter: LocatedParameter, parts: list[tuple[Part, int]]) -> dict[str, Placed]:
    names, shapes = parameter.hf_names, parameter.hf_shapes()
    runs: dict[str, list[Run]] = {name: [] for name in names}
    pieces = [(p.source, p.start, p.stop) for p in parameter.pieces(0)]
    if parameter.dim != 0:
        if len(pieces) != 1 or shapes != [parameter.shape]:
            raise WeightsError(f"{names}: lie in {parameter.name} otherwise than in whole rows, which is not converted")
        pieces = [(0, 0, shapes[0][0])]  # a single tensor, whole: its rows are the parameter's
    row = 0
    for source, start, stop in pieces:
        for part, first in parts:
            here, end = max(row, first), min(row + stop - start, first + part.shape[part.axis])
            if here < end:
                runs[names[source]].append(Run(start + here - row, start + end - row, part, here - first))
        row += stop - start
    placed = {}
    for name, shape in zip(names, shapes, strict=True):
        runs[name].sort(key=lambda run: run.start)
        starts, stops = [r.start for r in runs[name]], [r.stop for r in runs[name]]
        if [*starts, shape[0]] != [0, *stops]:
            raise WeightsError(f"{name}: its rows do not lie in {parameter.name} once each")
        placed[name] = Placed(shape, tuple(runs[name]), parameter.name)
    return placed


class _OnMeta(TorchFunctionMode):
    """Tensors made without values have no memory, whatever device they are asked for on."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        elif (
            function is torch.Tensor.to and args[0].is_meta and (len(args) < 2 or not isinstance(args[1], torch.dtype))
        ):
            return args[0]
        return function(*args, **kwargs)


@contextmanager
def one_rank() -> Iterator[None]:
    """megatron-core's state of a single rank, this process; torch.distributed is left as it was found."""
    platform.current().prepare_megatron()
    found = dist.is_initialized()
    if not found:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks.initialize(ParallelLayout(world_size=dist.get_world_size()), seed=1)
        yield
    finally:
        ranks.destroy()
        if not found:
            dist.destroy_process_group()
