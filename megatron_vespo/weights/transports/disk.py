"""Weights through a folder that engines read: any engine, any shared file system, a whole copy of them a version."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vespo.weights.buckets import Named
from megatron_vespo.weights.fp8 import quantise_stream
from megatron_vespo.weights.save import CHECKSUM_FILE, save_hf_folder
from megatron_vespo.weights.sync import EngineWeights, SyncReport, on_each, prove


def version_folder(folder: Path, version: int) -> Path:
    return folder / f"version_{version:06d}"


class DiskTransport:
    """Writes each version as an HF folder, best in memory that the engines share (/dev/shm)."""

    def __init__(
        self,
        engines: Sequence[EngineWeights],
        folder: Path,
        source_folder: Path,
        *,
        bucket_bytes: int = 1 << 30,
        keep: int = 2,
        fp8: bool = False,
    ) -> None:
        """``source_folder``: the HF folder whose config and tokenizer go with the weights. ``bucket_bytes``: of one
        file, which is held in memory until it is whole. ``keep``: how many of the newest versions stay; two, since an
        engine that someone restarts may still be reading the one before. ``fp8``: the folder holds fp8 blocks."""
        self.engines, self.folder, self.source_folder = engines, folder, source_folder
        self.bucket_bytes, self.keep, self.fp8 = bucket_bytes, keep, fp8

    def publish(self, version: int, tensors: Iterable[Named]) -> SyncReport:
        start = time.perf_counter()
        target = version_folder(self.folder, version)
        stream = quantise_stream(tensors) if self.fp8 else tensors
        save_hf_folder(stream, target, self.source_folder, self.bucket_bytes)
        sent = {
            name: entry["checksum"]
            for name, entry in json.loads((target / CHECKSUM_FILE).read_text())["tensors"].items()
        }
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        # Paused: an engine that loads in place would wait for the last running request, or mix versions.
        on_each(self.engines, lambda engine: engine.pause())
        arrived = on_each(self.engines, lambda engine: engine.load_folder(target, version))
        checked = prove(self.engines, sent, arrived)
        on_each(self.engines, lambda engine: engine.resume())
        self._prune(version)
        return SyncReport(version, time.perf_counter() - start, size, size, len(sent), checked)

    def close(self) -> None:
        pass

    def _prune(self, newest: int) -> None:
        versions = self._versions()
        # Higher numbers are of a run that was set back to a checkpoint since: no engine will be told of them again.
        older = sorted((version for version in versions if version < newest), reverse=True)
        for version in versions.keys() - {newest, *older[: self.keep - 1]}:
            shutil.rmtree(versions[version])

    def _versions(self) -> dict[int, Path]:
        found = {path: re.fullmatch(r"version_(\d+)", path.name) for path in self.folder.glob("version_*")}
        return {int(match[1]): path for path, match in found.items() if match}
