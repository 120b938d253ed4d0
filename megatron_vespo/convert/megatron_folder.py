"""A Megatron distributed checkpoint seen as HF tensors: read and written by their names, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from megatron_vespo.convert.distributed import METADATA_FILE, Reader, Stored, Writer
from megatron_vespo.convert.placement import Part, Placed, Placement, Run
from megatron_vespo.convert.safetensors_folder import read_checksums
from megatron_vespo.weights.mapping import Shape, WeightsError


@dataclass(frozen=True, slots=True)
class Info:
    dtype: torch.dtype
    shape: Shape


class MegatronReader:
    """Raises WeightsError, at once, for a checkpoint of another model, and for one that lacks a file or a part."""

    def __init__(self, folder: Path, placement: Placement) -> None:
        self.folder = folder
        self.checksums = read_checksums(folder)
        self._reader = Reader(folder, prove=not self.checksums)
        self._placed = placement.tensors
        problems = [p for p in map(self._reader.check, placement.parts) if p]
        if problems:
            raise WeightsError(f"{folder} is not of the model of config.json:\n" + "\n".join(problems[:20]))
        self.tensors = {
            name: Info(self._reader.dtype(placed.runs[0].part), placed.shape) for name, placed in self._placed.items()
        }
        self._chunks = lru_cache(maxsize=256)(self._reader.chunks)

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def extra_keys(self, placement: Placement) -> list[str]:
        """Weights of the checkpoint that the model does not have; what an optimizer keeps does not count."""
        known = {part.key for part in placement.parts}
        return [key for key in self._reader.tensors if key not in known and not key.startswith("optimizer.")]

    def read(self, name: str, row: int, into: torch.Tensor) -> torch.Tensor:
        for run, start, stop in _overlap(self._placed[name], row, len(into)):
            chunks: list[Stored] = self._chunks(run.part)
            self._reader.read(run.part, chunks, run.row + start - run.start, into[start - row : stop - row])
        return into

    def checksum(self, name: str) -> str | None:
        return self.checksums.get(name)

    def where(self, name: str) -> str:
        parts = {run.part for run in self._placed[name].runs}
        files = sorted({str(stored.file) for part in parts for stored in self._chunks(part)})
        return f"{', '.join(files)}: {name} ({self._placed[name].parameter})"

    def close(self) -> None:
        self._reader.close()


class MegatronWriter:
    """A checkpoint whose tensors are given by their HF names, in any order."""

    def __init__(self, folder: Path, placement: Placement, dtypes: Mapping[str, torch.dtype]) -> None:
        """``dtypes``: of every HF tensor. Raises WeightsError where those of one Megatron parameter differ."""
        self._placed = placement.tensors
        self.tensors = {name: Info(dtypes[name], placed.shape) for name, placed in self._placed.items()}
        of_parts: dict[Part, tuple[str, torch.dtype]] = {}
        for name, placed in self._placed.items():
            for run in placed.runs:
                first, dtype = of_parts.setdefault(run.part, (name, dtypes[name]))
                if dtype != dtypes[name]:
                    raise WeightsError(
                        f"{first} is {dtype} and {name} is {dtypes[name]}, and both lie in {placed.parameter}: give "
                        "--precision bf16 or fp32, which makes them one"
                    )
        self._writer = Writer(folder, [(part, of_parts[part][1]) for part in placement.parts], placement.objects)
        self.nbytes = self._writer.nbytes

    def write(self, name: str, row: int, rows: torch.Tensor) -> None:
        for run, start, stop in _overlap(self._placed[name], row, len(rows)):
            self._writer.write(run.part, run.row + start - run.start, rows[start - row : stop - row])

    def read(self, name: str, row: int, into: torch.Tensor) -> None:
        for run, start, stop in _overlap(self._placed[name], row, len(into)):
            self._writer.read(run.part, run.row + start - run.start, into[start - row : stop - row])

    def finish(self) -> None:
        self._writer.finish()

    def close(self) -> None:
        self._writer.close()


def is_megatron_folder(folder: Path) -> bool:
    return (folder / METADATA_FILE).is_file()


def _overlap(placed: Placed, row: int, count: int) -> Iterator[tuple[Run, int, int]]:
    """The runs that hold HF rows ``row:row + count``, each with the rows ``start:stop`` that it holds of them."""
    for run in placed.runs:
        start, stop = max(row, run.start), min(row + count, run.stop)
        if start < stop:
            yield run, start, stop
