"""A Hugging Face checkpoint straight into a live Megatron model, whatever its parallel layout.

Each rank first plans what it copies from where, from the headers of the files alone; all ranks compare notes, so that
they refuse a checkpoint together and before anything is changed; then each reads only its own pieces, file by file.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from megatron_vespo.weights.mapping import (
    EMBEDDING,
    IGNORED_HF_TENSORS,
    OUTPUT,
    Shape,
    WeightsError,
    family,
    is_multi_token_prediction,
)
from megatron_vespo.weights.parameters import LocatedParameter, locate_parameters, unwrap

INDEX_FILE = "model.safetensors.index.json"
_READABLE = {"F64", "F32", "F16", "BF16"}
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class _Copy:
    """``source[cut]`` of a file goes to ``target``, a part of a live parameter."""

    source: str
    cut: tuple[slice, ...]
    target: torch.Tensor


class _Checkpoint:
    """The tensors of an HF folder by name: their files and, from the files' headers, their shapes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _tensor_files(folder)
        self._headers: dict[Path, dict[str, tuple[Shape, str]]] = {}

    def header(self, name: str) -> tuple[Shape, str]:
        """(shape, safetensors dtype). Raises WeightsError when the file is missing, broken or without the tensor."""
        file = self.files[name]
        if file not in self._headers:
            with _open(file) as handle:
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
                self._headers[file] = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        if name not in self._headers[file]:
            raise WeightsError(f"{name}: {self.folder / INDEX_FILE} says it is in {file}, and it is not")
        return self._headers[file][name]


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
    checkpoint = _Checkpoint(folder)
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
        with _open(file) as handle:
            for copy in copies:
                copy.target.copy_(handle.get_slice(copy.source)[copy.cut])


def stream_hf(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an HF folder, file by file. Raises WeightsError."""
    files = _tensor_files(folder)
    for file in sorted(set(files.values())):
        with _open(file) as handle:
            for name in sorted(name for name, place in files.items() if place == file):
                yield name, handle.get_tensor(name)


def _leave_out_multi_token_prediction(checkpoint: _Checkpoint, hf_config: PreTrainedConfig) -> None:
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


def _plan(parameter: LocatedParameter, checkpoint: _Checkpoint, plan: dict[Path, list[_Copy]]) -> list[str]:
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


def _check_tied(embedding: LocatedParameter, output: str, checkpoint: _Checkpoint) -> list[str]:
    """transformers does not tie two tensors that differ, whatever config.json says, and Megatron would."""
    files = [checkpoint.files[name] for name in (*embedding.hf_names, output)]
    for piece in embedding.pieces(embedding.rank):
        with _open(files[0]) as ours, _open(files[1]) as theirs:
            rows = slice(piece.start, piece.stop)
            if not torch.equal(ours.get_slice(embedding.hf_names[0])[rows], theirs.get_slice(output)[rows]):
                return [
                    f"{output}: in {files[1]}, it differs from {embedding.hf_names[0]}, though config.json ties the two"
                ]
    return []


def _zero_padding(parameter: LocatedParameter) -> None:
    filled = sum(piece.stop - piece.start for piece in parameter.pieces(parameter.rank))
    parameter.tensor.narrow(parameter.dim, filled, parameter.shape[parameter.dim] - filled).zero_()


def _agree(problems: list[str], wanted: set[str], checkpoint: _Checkpoint, device: torch.device) -> None:
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


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. Raises WeightsError where there are no safetensors."""
    index = folder / INDEX_FILE
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise WeightsError(f"{folder}: neither {INDEX_FILE} nor {single.name} is there")
    with _open(single) as handle:
        return dict.fromkeys(handle.keys(), single)


def _open(file: Path) -> Any:
    """safe_open. Raises WeightsError naming the file where it is missing or broken."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: {error}") from error
