"""A Hugging Face checkpoint straight into a live Megatron model, whatever its parallel layout.

Each rank first plans what it copies from where, from the headers of the files alone; all ranks compare notes, so that
they refuse a checkpoint together and before anything is changed; then each reads only its own pieces, file by file.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedConfig

from megatron_vespo.weights.hf_folder import HfFolder, open_tensors
from megatron_vespo.weights.mapping import (
    EMBEDDING,
    IGNORED_HF_TENSORS,
    OUTPUT,
    WeightsError,
    family,
    is_multi_token_prediction,
)
from megatron_vespo.weights.parameters import LocatedParameter, locate_parameters, unwrap

_READABLE = {"F64", "F32", "F16", "BF16"}
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class _Copy:
    """``source[cut]`` of a file goes to ``target``, a part of a live parameter."""

    source: str
    cut: tuple[slice, ...]
    target: torch.Tensor


def load_hf(models: Sequence[torch.nn.Module], folder: Path) -> None:
    """Fills every parameter of ``models`` from the safetensors of ``folder``, converted to the parameters' dtype.

    Collective over all ranks. ``models``: this rank's chunks, one a virtual pipeline stage, wrapped or not; an
    optimizer that keeps copies of the parameters is built afterwards (or told to reload them). Vocabulary padding
    becomes 0. Layers for multi-token prediction are not loaded, and rank 0 logs it. Raises WeightsError, on every rank
    the same, before anything is changed: a tensor that is missing, that has another shape or a dtype that is not
    floating point, or that no parameter takes.
    """
    hf_config = AutoConfig.from_pretrained(folder)
    parameters = locate_parameters(models, hf_config)
    checkpoint = HfFolder(folder)
    _leave_out_multi_token_prediction(checkpoint, hf_config)
    plan: dict[Path, list[_Copy]] = defaultdict(list)
    problems: list[str] = []
    for parameter in parameters:
        problems += _plan(parameter, checkpoint, plan)
    wanted = {name for parameter in parameters for name in parameter.hf_names}
    if unwrap(models[0]).share_embeddings_and_output_weights:
        output = family(hf_config.model_type)[OUTPUT].hf[0]
        wanted.add(output)  # some checkpoints of tied models hold it as well
        if output in checkpoint.files and not problems:
            problems += [p for x in parameters if x.key == EMBEDDING for p in _check_tied(x, output, checkpoint)]
    _agree(problems, wanted, checkpoint, parameters[0].tensor.device)

    for parameter in parameters:
        _zero_padding(parameter)
    for file, copies in plan.items():
        with open_tensors(file) as handle:
            for copy in copies:
                copy.target.copy_(handle.get_slice(copy.source)[copy.cut])


def _leave_out_multi_token_prediction(checkpoint: HfFolder, hf_config: PreTrainedConfig) -> None:
    predicting = getattr(hf_config, "num_nextn_predict_layers", None) or 0
    layers = hf_config.num_hidden_layers
    left_out = [name for name in checkpoint.files if is_multi_token_prediction(name, layers, predicting)]
    for name in left_out:
        del checkpoint.files[name]
    if left_out and dist.get_rank() == 0:
        logging.getLogger(__name__).warning(
            "%s: %d tensors of the %d layers for multi-token prediction (from model.layers.%d on) are not loaded, "
            "and exports will not hold them",
            *(checkpoint.folder, len(left_out), predicting, layers),
        )


def _plan(parameter: LocatedParameter, checkpoint: HfFolder, plan: dict[Path, list[_Copy]]) -> list[str]:
    """Adds to ``plan`` what fills one parameter; returns what is wrong with its sources."""
    problems = []
    for name, shape in zip(parameter.hf_names, parameter.hf_shapes(), strict=True):
        if name not in checkpoint.files:
            problems.append(f"{name}: missing, and the model's {parameter.name} needs it")
            continue
        try:
            found, dtype = checkpoint.header(name)
        except WeightsError as error:
            problems.append(str(error))
            continue
        file = checkpoint.files[name]
        if found != shape:
            problems.append(
                f"{name}: shape {list(found)} in {file}, and the model's {parameter.name} needs {list(shape)}"
            )
        if dtype not in _READABLE:
            problems.append(f"{name}: stored as {dtype} in {file}; only {sorted(_READABLE)} are read")
    if problems:
        return problems
    offset = 0
    for piece in parameter.pieces(parameter.rank):
        name, length = parameter.hf_names[piece.source], piece.stop - piece.start
        cut = (*[slice(None)] * parameter.dim, slice(piece.start, piece.stop))
        target = parameter.tensor.narrow(parameter.dim, offset, length)
        plan[checkpoint.files[name]].append(_Copy(name, cut, target))
        offset += length
    return []


def _check_tied(embedding: LocatedParameter, output: str, checkpoint: HfFolder) -> list[str]:
    """transformers does not tie two tensors that differ, whatever config.json says, and Megatron would."""
    files = [checkpoint.files[name] for name in (*embedding.hf_names, output)]
    for piece in embedding.pieces(embedding.rank):
        with open_tensors(files[0]) as ours, open_tensors(files[1]) as theirs:
            rows = slice(piece.start, piece.stop)
            if not torch.equal(ours.get_slice(embedding.hf_names[0])[rows], theirs.get_slice(output)[rows]):
                return [
                    f"{output}: in {files[1]}, it differs from {embedding.hf_names[0]}, though config.json ties the two"
                ]
    return []


def _zero_padding(parameter: LocatedParameter) -> None:
    filled = sum(piece.stop - piece.start for piece in parameter.pieces(parameter.rank))
    parameter.tensor.narrow(parameter.dim, filled, parameter.shape[parameter.dim] - filled).zero_()


def _agree(problems: list[str], wanted: set[str], checkpoint: HfFolder, device: torch.device) -> None:
    """Raises on every rank what any rank found wrong, and the tensors that no rank wants."""
    names = sorted(checkpoint.files)
    used = torch.tensor([name in wanted for name in names], dtype=torch.uint8, device=device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, problems[:_MOST_PROBLEMS])
    found = sorted({problem for rank in everyones for problem in rank})
    for name, taken in zip(names, used.tolist(), strict=True):
        if not taken and not IGNORED_HF_TENSORS.fullmatch(name):
            found.append(f"{name}: in {checkpoint.files[name]}, and no parameter of the model takes it")
    if found:
        more = [f"... and {len(found) - _MOST_PROBLEMS} more"] if len(found) > _MOST_PROBLEMS else []
        raise WeightsError("\n".join([f"{checkpoint.folder} does not fit the model:", *found[:_MOST_PROBLEMS], *more]))
