"""What one rank writes of a checkpoint: copied into host memory at one moment, put on disk while training goes on.

megatron-core plans who writes what, in the foreground, since planning is collective. Its own way to write beside the
training is not used: it forks a process for each file, from a rank whose other threads (gloo, NCCL, Ray) may hold locks
at that moment, and on a CPU it copies nothing, so that the next update would change what is being written.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vespo.samples.disk import DiskFull, file_digest, is_disk_full

FILES_PER_RANK = 2
"""Written side by side."""
BACKEND, VERSION = "torch_dist", 1
"""megatron-core's name of the format."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank has put on disk."""

    files: dict[str, tuple[int, str]]
    """Name -> (bytes, digest)."""
    results: list[WriteResult]
    """Where each tensor lies in them, for the index."""


class Snapshot(FileSystemWriterAsync):
    """Made by :class:`SnapshotStrategy`; :meth:`write` may be called from any thread, once."""

    index: Metadata | None
    """Of the whole checkpoint; on rank 0."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), thread_count=FILES_PER_RANK)
        self.folder = folder
        self._parts: list[tuple[str, list[tuple[WriteItem, Any]]]] = []
        """Files and what is to be in them: tensors in host memory that nothing else holds, or bytes."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Called by megatron-core once the plan is made."""
        for number, items in enumerate(_split_by_size_and_type(FILES_PER_RANK, plan.items)):
            if items:
                name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
                self._parts.append((name, [(item, _copied(item, planner)) for item in items]))

    def write(self) -> Written:
        """Returns when all of it is on disk, and gives the memory back. Raises
        :class:`~megatron_vespo.samples.disk.DiskFull`, OSError."""
        parts, self._parts = self._parts, []
        with ThreadPoolExecutor(FILES_PER_RANK) as threads:
            written = list(threads.map(self._write_file, parts))
        files = {name: (path.stat().st_size, file_digest(path)) for name, _ in parts for path in [self.folder / name]}
        return Written(files, [result for results in written for result in results])

    def _write_file(self, part: tuple[str, list[tuple[WriteItem, Any]]]) -> list[WriteResult]:
        name, contents = part
        path = self.folder / name
        form = SerializationFormat.TORCH_SAVE
        try:
            with path.open("wb") as stream:
                found = [_write_item(self.transforms, stream, data, item, name, form) for item, data in contents]
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:  # torch.save makes the second of the first
            if is_disk_full(error):
                raise DiskFull(f"{path}: the disk is full ({error}); the checkpoint is not kept") from None
            raise
        return found


class SnapshotStrategy(TorchDistSaveShardedStrategy):
    """For ``dist_checkpointing.save(..., async_sharded_save=True)``, which leaves ``snapshot`` here and writes nothing
    but what is common to all ranks."""

    snapshot: Snapshot

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        """As megatron-core's, with a writer of ours."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.snapshot = Snapshot(Path(checkpoint_dir))
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        tensors = mcore_to_pyt_state_dict(state, False)
        planned, *_ = save_state_dict_async_plan(tensors, self.snapshot, None, 0, planner=planner)
        self.snapshot.index = planned[1]
        return AsyncRequest(None, (), [])


def _copied(item: WriteItem, planner: SavePlanner) -> Any:
    data = planner.resolve_data(item)
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data
