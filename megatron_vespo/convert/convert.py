"""The two directions: an HF folder to a Megatron distributed checkpoint, and back."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig

from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.convert.files import Scratch
from megatron_vespo.convert.megatron_folder import MegatronReader, MegatronWriter, is_megatron_folder
from megatron_vespo.convert.partial import Partial
from megatron_vespo.convert.placement import Placement, place
from megatron_vespo.convert.safetensors_folder import HfReader, HfWriter
from megatron_vespo.convert.stream import DEFAULT_WORKERS, Change, Source, Target, Transfer, Written, bands
from megatron_vespo.policy.checkpoint_folder import HF_FOLDER
from megatron_vespo.weights.checksum import ALGORITHM
from megatron_vespo.weights.fp8 import BLOCK, SCALE_SUFFIX, is_block_quantised, quantise_blocks
from megatron_vespo.weights.mapping import IGNORED_HF_TENSORS, Shape, WeightsError, is_multi_token_prediction
from megatron_vespo.weights.save import CHECKSUM_FILE, carry_over, fit_config, write_json

Precision = Literal["bf16", "fp32", "fp8"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
_ALWAYS_FLOAT32 = re.compile(r".*\.e_score_correction_bias")
"""Kept in float32 in bf16 checkpoints, as released ones do: bf16 would round what the router's choice turns on."""
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    out: Path
    tensors: int
    nbytes: int
    """Of the HF tensors that were read."""
    seconds: float
    """Of moving them, without imports and planning."""
    proven: int
    """Tensors that an earlier, interrupted conversion had written."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rate = self.nbytes / self.seconds / 1e9
        lines = [
            f"{self.out}: {self.tensors:,} tensors, {self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s, {rate:.2f} GB/s"
        ]
        if self.proven:
            lines.append(f"{self.proven:,} of them were there already, from an interrupted conversion, and are proven")
        return "\n".join([*lines, *self.notes])


def to_megatron(
    hf: Path,
    out: Path,
    *,
    precision: Literal["bf16", "fp32"] | None = None,
    workers: int = DEFAULT_WORKERS,
    console: Console | None = None,
) -> Report:
    """Write the model of an HF folder as a distributed checkpoint, loadable under any parallel layout.

    ``precision``: None keeps each tensor's own; fp8 blocks become bf16. Raises WeightsError for weights that are not
    whole or not those of config.json, ConfigError for an OUT that cannot be used or has no room.
    """
    config = read_hf_config(hf)
    source = HfReader(hf, dequantised=_DTYPES[precision or "bf16"])
    with closing(source):
        placement = find_placement(config, hf)
        notes = check_complete(source, config, placement)
        wanted = {name: source.stored[name].nbytes for name in placement.tensors}
        dtypes = {name: _dtype(name, source.tensors[name].dtype, precision) for name in placement.tensors}
        identity = _identity(
            "to-megatron", hf, precision, [file for file in sorted({i.file for i in source.stored.values()})]
        )
        partial = Partial(out, identity)
        with closing(partial), closing(MegatronWriter(partial.folder, placement, dtypes)) as target:
            report = _transfer(source, target, partial, _cast(dtypes), wanted, workers, "to Megatron", console)
            folder = partial.folder / HF_FOLDER
            folder.mkdir(exist_ok=True)
            carry_over(hf, folder)
            _finish_config(folder / "config.json", partial)
            partial.commit()
    return Report(out, len(wanted), sum(wanted.values()), *report, tuple(notes))


def to_hf(
    megatron: Path,
    out: Path,
    *,
    hf: Path | None = None,
    precision: Precision | None = None,
    workers: int = DEFAULT_WORKERS,
    max_shard_bytes: int = 4 << 30,
    console: Console | None = None,
) -> Report:
    """Write a distributed checkpoint, of a conversion or of a run, as an HF folder.

    ``hf``: where config and tokenizer are taken from; None: what the conversion kept, or model.path of the run.
    ``precision``: None keeps each tensor's own; fp8 writes blocks of 128 x 128. Raises as :func:`to_megatron`.
    """
    hf = hf or find_hf(megatron)
    config = read_hf_config(hf)
    placement = find_placement(config, hf)
    with closing(MegatronReader(megatron, placement)) as source:
        dtypes = {name: _dtype(name, info.dtype, precision) for name, info in source.tensors.items()}
        fp8 = precision == "fp8"
        layout = [
            t for name in source.tensors for t in _written(name, dtypes[name], source.tensors[name].shape, fp8=fp8)
        ]
        wanted = {name: info.dtype.itemsize * torch.Size(info.shape).numel() for name, info in source.tensors.items()}
        identity = _identity("to-hf", megatron, precision, sorted(megatron.glob("*.distcp")), str(hf.resolve()))
        partial = Partial(out, identity)
        with closing(partial), closing(HfWriter(partial.folder, layout, max_shard_bytes)) as target:
            change = _in_blocks(dtypes) if fp8 else _cast(dtypes)
            report = _transfer(source, target, partial, change, wanted, workers, "to HF", console)
            carry_over(hf, partial.folder)
            _finish_config(partial.folder / "config.json", partial)
            partial.commit()
    return Report(out, len(wanted), sum(wanted.values()), *report)


def find_hf(megatron: Path) -> Path:
    """The HF folder with config and tokenizer that belongs to a distributed checkpoint. Raises ConfigError."""
    if not is_megatron_folder(megatron):
        raise ConfigError(f"{megatron}: no .metadata there; give the folder of a Megatron distributed checkpoint")
    if (megatron / HF_FOLDER / "config.json").is_file():
        return megatron / HF_FOLDER
    resolved = megatron.resolve().parent.parent / "config.resolved.yaml"  # RUN/checkpoints/step_N
    if resolved.is_file():
        return load_config(resolved, ()).run.model.path
    raise ConfigError(
        f"{megatron}: neither {HF_FOLDER}/config.json (of a conversion) nor {resolved} (of a run) is there; give --hf, "
        "the HF folder with the model's config.json and tokenizer"
    )


def read_hf_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json there; give the folder of an HF model")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'}: not a model config that transformers reads ({error})") from None


def check_complete(source: HfReader, config: PreTrainedConfig, placement: Placement) -> list[str]:
    """Notes on what is left out. Raises WeightsError naming tensors that are missing, unknown, or of another shape."""
    problems = []
    for name, placed in placement.tensors.items():
        if name not in source.tensors:
            problems.append(f"{name}: missing, and the model's {placed.parameter} needs it")
        elif source.tensors[name].shape != placed.shape:
            problems.append(
                f"{name}: shape {list(source.tensors[name].shape)} in {source.stored[name].file}, and the model's "
                f"{placed.parameter} needs {list(placed.shape)}"
            )
    omitted = left_out(source, config, placement)
    for name in source.tensors:
        if name not in placement.tensors and name not in omitted:
            problems.append(f"{name}: in {source.stored[name].file}, and no parameter of the model takes it")
    problems = problems or check_tied(source, placement)
    if problems:
        more = [f"... and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        found = "\n".join([*problems[:_MOST_PROBLEMS], *more])
        raise WeightsError(f"{source.folder} does not hold the model of its config.json:\n{found}")
    return [f"left out: {note}" for note in dict.fromkeys(omitted.values())]


def left_out(source: HfReader, config: PreTrainedConfig, placement: Placement) -> dict[str, str]:
    """Tensors of an HF folder that a distributed checkpoint of the model does not hold, and why."""
    layers, predicting = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    found = {}
    for name in source.tensors:
        if name in placement.tensors:
            continue
        if is_multi_token_prediction(name, layers, predicting):
            found[name] = f"layers for multi-token prediction (from model.layers.{layers} on)"
        elif placement.tied and name == placement.tied[0]:
            found[name] = f"{name}, which equals {placement.tied[1]} (tie_word_embeddings)"
        elif IGNORED_HF_TENSORS.fullmatch(name):
            found[name] = f"tensors that follow from config.json, such as {name}"
    return found


def check_tied(source: HfReader, placement: Placement) -> list[str]:
    """transformers does not tie two tensors that differ, whatever config.json says, and Megatron would."""
    if not placement.tied or placement.tied[0] not in source.tensors:
        return []
    output, embedding = placement.tied
    ours, theirs = bands(source, embedding, Scratch()), bands(source, output, Scratch())
    same = source.tensors[embedding].shape == source.tensors[output].shape
    if same and all(torch.equal(a[2], b[2]) for a, b in zip(ours, theirs, strict=True)):
        return []
    return [f"{output}: in {source.stored[output].file}, it differs from {embedding}, though config.json ties the two"]


def find_placement(config: PreTrainedConfig, folder: Path) -> Placement:
    try:
        return place(config)
    except WeightsError:
        raise
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None


def _dtype(name: str, stored: torch.dtype, precision: Precision | None) -> torch.dtype:
    if precision is None:
        return stored
    return torch.float32 if _ALWAYS_FLOAT32.fullmatch(name) else _DTYPES[precision]


def _cast(dtypes: Mapping[str, torch.dtype]) -> Change:
    return lambda name, row, rows: [(name, row, rows.to(dtypes[name]))]


def _in_blocks(dtypes: Mapping[str, torch.dtype]) -> Change:
    cast = _cast(dtypes)

    def change(name: str, row: int, rows: torch.Tensor) -> Written:
        if not is_block_quantised(name):
            return cast(name, row, rows)
        values, scales = quantise_blocks(rows)
        return [(name, row, values.contiguous()), (name + SCALE_SUFFIX, row // BLOCK, scales)]

    return change


def _written(name: str, dtype: torch.dtype, shape: Shape, *, fp8: bool) -> list[tuple[str, torch.dtype, Shape]]:
    if not (fp8 and is_block_quantised(name)):
        return [(name, dtype, shape)]
    blocks = tuple(-(-size // BLOCK) for size in shape)
    return [(name, torch.float8_e4m3fn, shape), (name + SCALE_SUFFIX, torch.float32, blocks)]


def _identity(command: str, source: Path, precision: str | None, files: list[Path], hf: str = "") -> dict[str, Any]:
    stats = [(file.name, file.stat()) for file in files]
    return {
        "command": command,
        "source": str(source.resolve()),
        "source files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "precision": precision,
        "hf": hf,
        "torch": torch.__version__,  # which frames tensors
    }


def _transfer(
    source: Source,
    target: Target,
    partial: Partial,
    change: Change,
    wanted: Mapping[str, int],
    workers: int,
    what: str,
    console: Console | None,
) -> tuple[float, int]:
    """(seconds, tensors that were there already)."""
    partial.require_space(target.nbytes)
    started = time.perf_counter()
    proven = Transfer(source, target, partial, change).run(wanted, workers, what, console or Console(quiet=True))
    target.finish()
    return time.perf_counter() - started, proven


def _finish_config(file: Path, partial: Partial) -> None:
    """checksums.json, and a config.json that tells what the weights are now."""
    tensors = {name: entry for name in sorted(partial.done) for name, entry in partial.done[name].items()}
    write_json(partial.folder / CHECKSUM_FILE, {"algorithm": ALGORITHM, "tensors": tensors})
    fit_config(file, tensors)
