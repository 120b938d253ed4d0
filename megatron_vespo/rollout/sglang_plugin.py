"""What we add to SGLang, by its own plugin framework: checksums of arriving weights, and deltas undone.

SGLang calls :func:`install` in each of its processes where megatron_vespo is installed beside it (entry point
``sglang.srt.plugins`` in pyproject.toml). Where it is not, weights arrive all the same, and unproven. A checksum goes
back in the message of SGLang's answer, as JSON; an answer has no field for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from megatron_vespo import platform
from megatron_vespo.rollout.sglang import SGLANG_VERSION
from megatron_vespo.weights.buckets import Named
from megatron_vespo.weights.transports.place import is_place, open_place
from megatron_vespo.weights.wire import Arrivals

_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_BUCKET = "sglang.srt.weight_sync.tensor_bucket.FlattenedTensorBucket"
_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"

arrivals = Arrivals()
"""Of this process: a tensor-parallel rank."""
_reading_folder = False


def install() -> None:
    """Raises RuntimeError for an SGLang whose functions this does not know; SGLang logs it, and runs without."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if version("sglang") != SGLANG_VERSION:
        raise RuntimeError(f"the checksums of weights know SGLang {SGLANG_VERSION}, {version('sglang')} is installed")
    HookRegistry.register(f"{_BUCKET}.reconstruct_tensors", _take_apart, HookType.AROUND)
    HookRegistry.register(f"{_LOADER}.load_weights_and_postprocess", _folder_arrives, HookType.BEFORE)
    HookRegistry.register(f"{_MANAGER}.begin_weight_update", _begin, HookType.AROUND)
    HookRegistry.register(f"{_MANAGER}.end_weight_update", _end, HookType.AROUND)
    HookRegistry.register(f"{_MANAGER}.update_weights_from_tensor", _from_tensor, HookType.AROUND)
    HookRegistry.register(f"{_MANAGER}.update_weights_from_disk", _from_disk, HookType.AROUND)


def _take_apart(original: Callable[..., list[Named]], bucket: Any) -> list[Named]:
    """A broadcast bucket and one in memory of this machine both come here, before the model loads them."""
    first, *rest = bucket.metadata
    if is_place(first.name):
        bucket.flattened_tensor = open_place(first.name, rest[-1].end_idx)
        bucket.metadata = rest
    return list(arrivals.accept(original(bucket)))


def _folder_arrives(model: Any, weights: Iterable[Named], target_device: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # At launch, too, weights come this way; nobody asks for their checksums.
    return (model, arrivals.accept(weights) if _reading_folder else weights, target_device), {}


def _begin(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    answer = original(manager, request)
    if answer.success:
        kept = _of_all_ranks(manager, arrivals.begin())
        answer.message = json.dumps({"kept": kept[0] if len(set(kept)) == 1 else ""})
    return answer


def _end(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    answer = original(manager, request)
    if answer.success:
        answer.message = json.dumps({"checksums": _checksums(manager)})
    return answer


def _from_disk(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    global _reading_folder
    arrivals.forget()
    arrivals.begin()
    _reading_folder = True
    try:
        answer = original(manager, request)
    finally:
        _reading_folder = False
    if answer.success:
        answer.message = json.dumps({"checksums": _checksums(manager)})
    return answer


def _from_tensor(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """The answer tells the sender that it may write into the bucket: all copies out of it must be done."""
    answer = original(manager, request)
    platform.current().synchronize()
    return answer


def _checksums(manager: Any) -> dict[str, str]:
    """Of the tensors that arrived; one that differs between ranks has the checksums of all."""
    found = _of_all_ranks(manager, arrivals.end())
    names = set().union(*found)
    return {name: "/".join(sorted({checksums.get(name, "none") for checksums in found})) for name in names}


def _of_all_ranks(manager: Any, value: Any) -> list[Any]:
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size(manager.tp_cpu_group)
    dist.all_gather_object(values, value, group=manager.tp_cpu_group)
    return values
