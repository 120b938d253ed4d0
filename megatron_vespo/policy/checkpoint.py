"""Save and load the trainer's state by megatron-core's dist_checkpointing, loadable under another layout.

What lies in its folder beside the tensors, and the driver's part: checkpoint_folder.py. No generator's state is kept
because none is used: the model has no dropout, and sampling seeds are counted, not drawn.

Saving has four parts, so that training stands still for the first alone: :func:`take_snapshot`, ``Snapshot.write``,
:func:`seal` and ``checkpoint_folder.commit``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vespo import platform
from megatron_vespo.policy.checkpoint_folder import (
    STATE_FILE,
    CheckpointError,
    partial_folder,
    record_digest,
    shape,
    sync,
)
from megatron_vespo.policy.snapshot import BACKEND, VERSION, Snapshot, SnapshotStrategy, Written
from megatron_vespo.samples.disk import file_digest, free_bytes, require_space

HEADER_BYTES = 4096
"""More than a tensor takes beside its bytes."""


def take_snapshot(
    folder: Path,
    models: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> Snapshot:
    """Collective. What this rank has to write of the checkpoint ``folder``, as it is now, in host memory; training may
    go on. Raises :class:`~megatron_vespo.samples.disk.DiskFull`, on all ranks, before anything is written.

    Then each rank calls :meth:`~megatron_vespo.policy.snapshot.Snapshot.write`, rank 0 :func:`seal` with what they
    return, and someone ``checkpoint_folder.commit``; none of that is collective."""
    state = _sharded_state(models, optimizer, scheduler, loading=False)
    _require_space(folder, state)
    partial = partial_folder(folder)
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
            sync(path)
    record: dict[str, Any] = {"driver": driver_state, "model": shape(hf_config), "files": dict(sorted(files.items()))}
    record["digest"] = record_digest(json.loads(json.dumps(record)))
    (partial / STATE_FILE).write_text(json.dumps(record, indent=1))
    sync(partial / STATE_FILE)
    sync(partial)


def _require_space(folder: Path, state: dict[str, Any]) -> None:
    """Raises DiskFull on every rank where the tensors of all do not fit on the fullest of their disks."""
    parts = [p for p in nested_values(state) if isinstance(p, ShardedTensor | ShardedTensorFactory)]
    mine = sum(HEADER_BYTES + p.data.nbytes for p in parts if p.data is not None and is_main_replica(p.replica_id))
    needed = torch.tensor([mine], dtype=torch.int64, device=platform.current().device)
    free = torch.tensor([free_bytes(folder)], dtype=torch.int64, device=platform.current().device)
    dist.all_reduce(needed)
    dist.all_reduce(free, dist.ReduceOp.MIN)
    require_space(folder.parent, int(needed), f"checkpoint {folder.name}", free=int(free))


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
