"""A run's ``checkpoints`` folder as the driver knows it, without megatron-core: which are whole, what each holds.

A checkpoint is a folder ``step_000010`` that appears by rename once it is whole and on disk; beside the tensors it
holds ``state.json``: the driver's own state (step, weight version, data order), the shape of the model, size and digest
of every other file, and a digest of its own. One that lacks a file or a byte is passed over (:func:`newest`), one with
a changed byte is found by :func:`damage` before it is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoConfig

from megatron_vespo.samples.disk import file_digest

STATE_FILE = "state.json"
HF_FOLDER = "hf"
"""Inside a converted checkpoint: all of the HF folder but its weights."""
_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_experts",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "q_lora_rank",
    "kv_lora_rank",
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the folder and what differs."""


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint in a run's ``checkpoints`` folder."""
    return next(reversed(complete(checkpoints)), None)


def newest_step(checkpoints: Path) -> int:
    """0: there is none."""
    folder = newest(checkpoints)
    return 0 if folder is None else _step(folder)


def complete(checkpoints: Path) -> list[Path]:
    """Those that lack no file and no byte, the oldest first."""
    return sorted((folder for folder in _named(checkpoints) if _is_complete(folder)), key=_step)


def read_state(folder: Path) -> dict[str, Any]:
    """The driver's state saved in a checkpoint. Raises :class:`CheckpointError`."""
    return _read(folder)["driver"]


def set_incomplete_aside(checkpoints: Path) -> list[Path]:
    """Renames every checkpoint that lacks a file or a byte to ``<name>.damaged``; returns where they were."""
    incomplete = [folder for folder in _named(checkpoints) if not _is_complete(folder)]
    for folder in incomplete:
        set_aside(folder)
    return incomplete


def set_aside(folder: Path) -> None:
    aside = folder.with_name(folder.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def damage(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """Files of a checkpoint whose bytes are not those that were written, of every ``shares``-th file from ``share``."""
    digests = {name: digest for name, (_, digest) in sorted(_read(folder)["files"].items())}
    mine = list(digests)[share::shares]
    return [name for name in mine if not (folder / name).is_file() or file_digest(folder / name) != digests[name]]


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, what interrupted saves left, and what was set aside."""
    leftovers = [path for suffix in ("partial", "damaged") for path in checkpoints.glob(f"step_*.{suffix}")]
    for folder in [*complete(checkpoints)[:-keep], *leftovers]:
        shutil.rmtree(folder)


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / STATE_FILE).read_text())
        if record.get("digest", digest := record_digest(record)) != digest:
            raise ValueError("not the bytes that were written")
        return {"driver": record["driver"], "model": record["model"], "files": record.get("files", {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: not a complete checkpoint ({error})") from None


def record_digest(record: dict[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "digest"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _named(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("step_*") if path.name.removeprefix("step_").isdecimal()]


def _is_complete(folder: Path) -> bool:
    try:
        files = _read(folder)["files"]
        return all((folder / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, CheckpointError):
        return False


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def check_same_model(folder: Path, hf_config: Any) -> None:
    """Raises :class:`CheckpointError` when the checkpoint is of a model of another shape."""
    mend = "Set model.path to the model it was trained from, or run_dir to a new folder."
    _compare(folder, _read(folder)["model"], hf_config, mend)


def shape(hf_config: Any) -> dict[str, Any]:
    """What two models must have in common for one to load the other's checkpoint."""
    return {key: getattr(hf_config, key, None) for key in _SHAPE}


def _compare(folder: Path, saved: dict[str, Any], hf_config: Any, mend: str) -> None:
    ours = shape(hf_config)
    differing = [f"{key} is {saved.get(key)} there and {ours[key]} here" for key in ours if saved.get(key) != ours[key]]
    if differing:
        raise CheckpointError(f"{folder}: a checkpoint of another model: {'; '.join(differing)}. {mend}")


def check_weights(folder: Path, hf_config: Any) -> None:
    """Raises :class:`CheckpointError` for a distributed checkpoint of a model of another shape."""
    if (folder / STATE_FILE).is_file():
        saved = _read(folder)["model"]
    elif (folder / HF_FOLDER / "config.json").is_file():
        saved = shape(AutoConfig.from_pretrained(folder / HF_FOLDER))
    else:
        return  # of someone else's making: loading it will tell
    _compare(folder, saved, hf_config, "Set model.path to the HF folder of that model.")


def commit(folder: Path) -> None:
    """What checkpoint.seal has made whole becomes a checkpoint."""
    if folder.exists():
        set_aside(folder)
    partial_folder(folder).rename(folder)
    sync(folder.parent)


def partial_folder(folder: Path) -> Path:
    """Where the checkpoint ``folder`` is until it is whole."""
    return folder.with_name(folder.name + ".partial")


def sync(path: Path) -> None:
    """A file or folder is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
