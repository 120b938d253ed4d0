"""Save and load the trainer's state by megatron-core's dist_checkpointing, loadable under another layout.

A checkpoint is a folder ``step_000010`` that appears by rename once it is whole; beside the tensors it holds
``state.json``: the driver's own state (step, weight version, data order) and the shape of the model. No generator's
state is kept because none is used: the model has no dropout, and sampling seeds are counted, not drawn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from transformers import AutoConfig

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
    return max(_complete(checkpoints), key=_step, default=None)


def read_state(folder: Path) -> dict[str, Any]:
    """The driver's state saved in a checkpoint. Raises :class:`CheckpointError`."""
    try:
        return json.loads((folder / STATE_FILE).read_text())["driver"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: not a complete checkpoint ({error})") from None


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what interrupted saves left."""
    for folder in [*sorted(_complete(checkpoints), key=_step)[:-keep], *checkpoints.glob("step_*.partial")]:
        shutil.rmtree(folder)


def _complete(checkpoints: Path) -> list[Path]:
    return [p for p in checkpoints.glob("step_*") if p.suffix != ".partial" and (p / STATE_FILE).exists()]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def check_same_model(folder: Path, hf_config: Any) -> None:
    """Raises :class:`CheckpointError` when the checkpoint is of a model of another shape."""
    mend = "Set model.path to the model it was trained from, run_dir to a new folder, or checkpoint.resume=false."
    _compare(folder, json.loads((folder / STATE_FILE).read_text())["model"], hf_config, mend)


def _compare(folder: Path, saved: dict[str, Any], hf_config: Any, mend: str) -> None:
    ours = _shape(hf_config)
    differing = [f"{key} is {saved.get(key)} there and {ours[key]} here" for key in ours if saved.get(key) != ours[key]]
    if differing:
        raise CheckpointError(f"{folder}: a checkpoint of another model: {'; '.join(differing)}. {mend}")


def check_weights(folder: Path, hf_config: Any) -> None:
    """Raises :class:`CheckpointError` for a distributed checkpoint of a model of another shape."""
    if (folder / STATE_FILE).is_file():
        saved = json.loads((folder / STATE_FILE).read_text())["model"]
    elif (folder / HF_FOLDER / "config.json").is_file():
        saved = _shape(AutoConfig.from_pretrained(folder / HF_FOLDER))
    else:
        return  # of someone else's making: loading it will tell
    _compare(folder, saved, hf_config, "Set model.path to the HF folder of that model.")


def save_checkpoint(
    folder: Path,
    hf_config: Any,
    models: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    driver_state: dict[str, Any],
) -> None:
    """Collective. Writes ``<folder>.partial``, then renames it."""
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(models, optimizer, scheduler, loading=False)
    dist_checkpointing.save(state, str(partial), get_default_save_sharded_strategy("torch_dist", 1))
    dist.barrier()
    if dist.get_rank() == 0:
        record = {"driver": driver_state, "model": _shape(hf_config)}
        (partial / STATE_FILE).write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


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
