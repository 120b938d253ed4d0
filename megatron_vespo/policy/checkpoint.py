"""Save and load the trainer's state by megatron-core's dist_checkpointing, loadable under another layout.

A checkpoint is a folder ``step_000010`` that appears by rename once it is whole and on disk; beside the tensors it
holds ``state.json``: the driver's own state (step, weight version, data order), the shape of the model, size and digest
of every other file, and a digest of its own. One that lacks a file or a byte is passed over (:func:`newest`), one with
a changed byte is found by :func:`damage` before it is loaded. No generator's state is kept because none is used: the
model has no dropout, and sampling seeds are counted, not drawn.

Saving has four parts, so that training stands still for the first alone: :func:`take_snapshot`, ``Snapshot.write``,
:func:`seal` and :func:`commit`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from transformers import AutoConfig

from megatron_vespo import platform
from megatron_vespo.policy.snapshot import BACKEND, VERSION, Snapshot, SnapshotStrategy, Written
from megatron_vespo.samples.disk import file_digest, free_bytes, require_space

STATE_FILE = "state.json"
HEADER_BYTES = 4096
"""More than a tensor takes beside its bytes."""
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
        if record.get("digest", digest := _record_digest(record)) != digest:
            raise ValueError("not the bytes that were written")
        return {"driver": record["driver"], "model": record["model"], "files": record.get("files", {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: not a complete checkpoint ({error})") from None


def _record_digest(record: dict[str, Any]) -> str:
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


def _compare(folder: Path, saved: dict[str, Any], hf_config: Any, mend: str) -> None:
    ours = _shape(hf_config)
    differing = [f"{key} is {saved.get(key)} there and {ours[key]} here" for key in ours if saved.get(key) != ours[key]]
    if differing:
        raise CheckpointError(f"{folder}: a checkpoint of another model: {'; '.join(differing)}. {mend}")


def check_weights(folder: Path, hf_config: Any) -> None:
    """Raises :class:`CheckpointError` for a distributed checkpoint of a model of another shape."""
    if (folder / STATE_FILE).is_file():
        saved = _read(folder)["model"]
    elif (folder / HF_FOLDER / "config.json").is_file():
        saved = _shape(AutoConfig.from_pretrained(folder / HF_FOLDER))
    else:
        return  # of someone else's making: loading it will tell
    _compare(folder, saved, hf_config, "Set model.path to the HF folder of that model.")


def take_snapshot(
    folder: Path,
    models: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> Snapshot:
    """Collective. What this rank has to write of the checkpoint ``folder``, as it is now, in host memory; training may
    go on. Raises :class:`~megatron_vespo.samples.disk.DiskFull`, on all ranks, before anything is written.

    Then each rank calls :meth:`~megatron_vespo.policy.snapshot.Snapshot.write`, rank 0 :func:`seal` with what they
    return, and someone :func:`commit`; none of that is collective."""
    state = _sharded_state(models, optimizer, scheduler, loading=False)
    _require_space(folder, state)
    partial = _partial(folder)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    strategy = SnapshotStrategy()
    dist_checkpointing.save(state, str(partial), strategy, async_sharded_save=True)
    return strategy.snapshot


def seal(snapshot: Snapshot, hf_config: Any, driver_state: dict[str, Any], written: Sequence[Written]) -> None:
    """On rank 0, when every rank has written: the index of the tensors, and ``state.json`` over all files."""
    partial = snapshot.folder
    assert snapshot.index is not None, "rank 0 has it"
    snapshot.finish(snapshot.index, [part.results for part in written])
    save_config(CheckpointingConfig(BACKEND, VERSION), str(partial))
    files = {name: entry for part in written for name, entry in part.files.items()}
    for path in partial.iterdir():
        if path.name not in files:  # small, and written by this rank
            files[path.name] = (path.stat().st_size, file_digest(path))
            _sync(path)
    record: dict[str, Any] = {"driver": driver_state, "model": _shape(hf_config), "files": dict(sorted(files.items()))}
    record["digest"] = _record_digest(json.loads(json.dumps(record)))
    (partial / STATE_FILE).write_text(json.dumps(record, indent=1))
    _sync(partial / STATE_FILE)
    _sync(partial)


def commit(folder: Path) -> None:
    """What :func:`seal` has made whole becomes a checkpoint."""
    if folder.exists():
        set_aside(folder)
    _partial(folder).rename(folder)
    _sync(folder.parent)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _require_space(folder: Path, state: dict[str, Any]) -> None:
    """Raises DiskFull on every rank where the tensors of all do not fit on the fullest of their disks."""
    parts = [p for p in nested_values(state) if isinstance(p, ShardedTensor | ShardedTensorFactory)]
    mine = sum(HEADER_BYTES + p.data.nbytes for p in parts if p.data is not None and is_main_replica(p.replica_id))
    needed = torch.tensor([mine], dtype=torch.int64, device=platform.current().device)
    free = torch.tensor([free_bytes(folder)], dtype=torch.int64, device=platform.current().device)
    dist.all_reduce(needed)
    dist.all_reduce(free, dist.ReduceOp.MIN)
    require_space(folder.parent, int(needed), f"checkpoint {folder.name}", free=int(free))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(
    folder: Path,
    models: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Collective. Fills models, optimizer and scheduler, under whatever layout they have."""
    state = _sharded_state(models, optimizer, scheduler, loading=True)
    loaded = dist_checkpointing.load(state, str(folder), get_default_load_sharded_strategy(str(folder)))
    for i, model in enumerate(models):
        model.load_state_dict(loaded[f"model{i}"])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])


def load_weights(folder: Path, models: Sequence[GPTModel]) -> None:
    """Collective. Fills the parameters and buffers of ``models``, this rank's chunks, converted to their dtypes, from a
    distributed checkpoint with or without an optimizer's state, saved under any layout or converted."""
    # What layers keep beside tensors (of fp8 recipes) depends on the layer spec, and weights do not need it.
    state = {
        f"model{i}": {k: v for k, v in sharded_weights(model).items() if not isinstance(v, ShardedObject)}
        for i, model in enumerate(models)
    }
    loaded = dist_checkpointing.load(state, str(folder), get_default_load_sharded_strategy(str(folder)))
    for i, model in enumerate(models):
        missing, unexpected = model.load_state_dict(loaded[f"model{i}"], strict=False)
        wrong = [name for name in missing if not name.endswith("_extra_state")] + unexpected
        if wrong:
            raise CheckpointError(f"{folder}: does not fill {wrong}")


def _shape(hf_config: Any) -> dict[str, Any]:
    return {key: getattr(hf_config, key, None) for key in _SHAPE}


def sharded_weights(model: GPTModel) -> dict[str, Any]:
    """Names of a model chunk's parameters and buffers -> where they lie in a checkpoint, in megatron-core's terms."""
    return model.sharded_state_dict(metadata=_metadata())


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(
    models: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    loading: bool,
) -> dict[str, Any]:
    metadata = _metadata()
    parts = {f"model{i}": sharded_weights(model) for i, model in enumerate(models)}
    # Layer numbers are global in the keys, so one flat state serves the optimizer whatever the chunks are.
    flat = parts["model0"] if len(models) == 1 else parts
    return {
        **parts,
        "optimizer": optimizer.sharded_state_dict(flat, is_loading=loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
    }
