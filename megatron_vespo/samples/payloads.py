"""The tokens of samples that the ledger does not call final: files ``pending/<number>.safetensors``, by store.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vespo.samples.disk import file_digest
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.store import read_batch, write_batch

PENDING = "pending"


class Payloads:
    """Those under one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / PENDING

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def write(self, number: int, samples: Sequence[Sample]) -> tuple[int, str]:
        """(bytes, digest) of the file. Raises DiskFull before or instead of writing."""
        path = self.path(number)
        write_batch(path, samples)
        return path.stat().st_size, file_digest(path)

    def size(self, number: int) -> int | None:
        try:
            return self.path(number).stat().st_size
        except OSError:
            return None

    def is_intact(self, number: int, size: int, digest: str) -> bool:
        try:
            return self.size(number) == size and file_digest(self.path(number)) == digest
        except OSError:
            return False

    def remove(self, number: int) -> None:
        self.path(number).unlink(missing_ok=True)

    def remove_all_but(self, numbers: Iterable[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {self.path(number) for number in numbers}
        for path in self.folder.iterdir():
            if path not in kept:
                path.unlink()


class PayloadReader:
    """Samples out of payloads, each file read once. Raises StoreError."""

    def __init__(self, payloads: Payloads) -> None:
        self.payloads = payloads
        self._read: dict[int, list[Sample]] = {}

    def sample(
        self, number: int, place: int, grade: float | None, reward: float | None, error: str | None, parts: str | None
    ) -> Sample:
        """With what the ledger knows of its reward; ``parts``: JSON."""
        if number not in self._read:
            self._read[number] = read_batch(self.payloads.path(number))
        sample = self._read[number][place]
        sample.grade, sample.reward = grade, reward
        if error is not None:
            sample.metadata["reward_error"] = error
        if parts is not None:
            sample.metadata["reward_parts"] = json.loads(parts)
        return sample


def parts_of(sample: Sample) -> str | None:
    """What the parts of its reward said, as the ledger keeps it: JSON; None: its reward has one part."""
    parts = sample.metadata.get("reward_parts")
    return None if parts is None else json.dumps(parts)
