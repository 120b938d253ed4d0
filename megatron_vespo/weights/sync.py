"""How weights travel from the trainer to the engines: an interface, and the one transport so far, a folder on disk.

The trainer's ranks publish a version; the driver hands what rank 0 returned to every engine. For the disk transport
that is ``engine.update_weights_from_disk(folder, version)``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from megatron_vespo.weights.save import is_writer, save_hf_folder


class WeightTransport(Protocol):
    def publish(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Path:
        """Collective over the trainer's ranks, each with its stream of :func:`~.export.export_hf`.

        Returns what the driver tells the engines on rank 0: the folder to load ``version`` from.
        """


class DiskTransport:
    """Writes each version as an HF folder, best in memory that the engines share (/dev/shm)."""

    def __init__(self, folder: Path, source_folder: Path, keep: int = 2) -> None:
        """``source_folder``: the HF folder whose config and tokenizer go with the weights. ``keep``: how many of the
        newest versions stay; two, since an engine may still be reading the one before."""
        self.folder, self.source_folder, self.keep = folder, source_folder, keep

    def publish(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Path:
        target = self.folder / f"version_{version:06d}"
        save_hf_folder(tensors, target, self.source_folder)
        if is_writer():
            self._prune(version)
        return target

    def _prune(self, newest: int) -> None:
        versions = self._versions()
        # Higher numbers are of a run that was set back to a checkpoint since: no engine will be told of them again.
        older = sorted((version for version in versions if version < newest), reverse=True)
        for version in versions.keys() - {newest, *older[: self.keep - 1]}:
            shutil.rmtree(versions[version])

    def _versions(self) -> dict[int, Path]:
        found = {path: re.fullmatch(r"version_(\d+)", path.name) for path in self.folder.glob("version_*")}
        return {int(match[1]): path for path, match in found.items() if match}
