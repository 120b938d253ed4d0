"""Megatron's distributed checkpoint as a file format: ``torch_dist``, that of torch.distributed.checkpoint.

``.metadata`` lists for each tensor its chunks, and for each chunk a stretch of a ``.distcp`` file that holds what
torch.save makes of it: the chunk's bytes in row-major order, between a head and a tail (a zip archive). Knowing the
head, one can read and write any rows of a chunk in place; that is all that is done here, whatever the size of a tensor.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vespo.convert.files import Files
from megatron_vespo.convert.placement import Part
from megatron_vespo.convert.torch_save import check_bytes, first_byte, frame
from megatron_vespo.weights.mapping import Shape, WeightsError

METADATA_FILE = ".metadata"


@dataclass(frozen=True, slots=True)
class Stored:
    """One chunk: a box of a tensor, and the bytes ``start:start + length`` of a file that torch.save made of it."""

    offset: Shape
    shape: Shape
    dtype: torch.dtype
    file: Path
    start: int
    length: int


class Reader:
    """A checkpoint's tensors, read a few rows at a time. ``.metadata`` is a pickle: read only what you trust."""

    def __init__(self, folder: Path, *, prove: bool) -> None:
        """``prove``: each chunk against torch.save's own checksum of it, before it is first read.

        Raises WeightsError for a folder that is not such a checkpoint, or that has lost a file or a part of one.
        """
        self.folder, self._prove = folder, prove
        self._files = Files()
        if not (folder / METADATA_FILE).is_file():
            raise WeightsError(f"{folder}: no {METADATA_FILE} there; give the folder of a distributed checkpoint")
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # a pickle may fail in any way
            raise WeightsError(f"{folder / METADATA_FILE}: cannot be read ({error!r})") from None
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._stored: dict[str, list[Stored]] = {}
        self._starts: dict[Stored, int] = {}
        sizes: dict[Path, int] = {}
        for key, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                file = folder / info.relative_path
                if file not in sizes:
                    sizes[file] = _size(file, key)
                if info.offset + info.length > sizes[file]:
                    raise WeightsError(
                        f"{file}: has {sizes[file]} bytes, and {key} reaches to byte {info.offset + info.length}: "
                        "the file is truncated"
                    )
                stored = Stored(
                    tuple(chunk.offsets), tuple(chunk.sizes), tensor.properties.dtype, file, info.offset, info.length
                )
                self._stored.setdefault(key, []).append(stored)

    def dtype(self, part: Part) -> torch.dtype:
        return self.tensors[part.key].properties.dtype

    def check(self, part: Part) -> str | None:
        """What is wrong with where ``part`` should be; None: nothing."""
        if part.key not in self.tensors:
            return f"{part.key}: not in {self.folder / METADATA_FILE}, and the model of config.json needs it"
        found, axis = tuple(self.tensors[part.key].size), part.axis
        # An embedding saved under tensor parallelism has rows of padding.
        last = part.offset[axis] + part.shape[axis] == part.whole[axis]
        fits = [
            a == b or (i == axis and last and a > b) for i, (a, b) in enumerate(zip(found, part.whole, strict=False))
        ]
        if len(found) != len(part.whole) or not all(fits):
            return (
                f"{part.key}: shape {list(found)} in {self.folder / METADATA_FILE}, and the model of config.json needs "
                f"{list(part.whole)}"
            )
        return None

    def chunks(self, part: Part) -> list[Stored]:
        """Those that hold some of it."""
        return [
            stored
            for stored in self._stored[part.key]
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(part.offset, part.shape, stored.offset, stored.shape, strict=True)
            )
        ]

    def read(self, part: Part, chunks: Iterable[Stored], row: int, into: torch.Tensor) -> None:
        """Rows of ``part`` from ``row`` on into ``into`` [rows, *rest], contiguous, of the checkpoint's dtype.

        ``chunks``: those of :meth:`chunks`. Raises WeightsError naming the file and the tensor.
        """
        axis, filled = part.axis, 0
        begin = part.offset[axis] + row
        end = begin + len(into)
        for chunk in chunks:
            here, stop = max(begin, chunk.offset[axis]), min(end, chunk.offset[axis] + chunk.shape[axis])
            if here >= stop:
                continue
            rest = chunk.shape[axis + 1 :]
            above = _ravel(
                [a - b for a, b in zip((*part.offset[:axis], here), chunk.offset, strict=False)], chunk.shape
            )
            rows = into[here - begin : stop - begin]
            start = self._start(chunk, part.key) + above * math.prod(rest) * chunk.dtype.itemsize
            if rest == part.shape[axis + 1 :]:
                self._files.read(chunk.file, start, rows, part.key)
            else:
                columns = torch.empty((stop - here, *rest), dtype=chunk.dtype)
                self._files.read(chunk.file, start, columns, part.key)
                box = [
                    slice(offset, offset + size) for offset, size in zip(chunk.offset[axis + 1 :], rest, strict=True)
                ]
                rows[(slice(None), *box)] = columns
            filled += (stop - here) * math.prod(rest)
        if filled != into.numel():
            raise WeightsError(
                f"{self.folder / METADATA_FILE}: the chunks of {part.key} hold {filled} of the {into.numel()} elements "
                f"of rows {begin} to {end}"
            )

    def _start(self, chunk: Stored, key: str) -> int:
        """The byte of the file at which the chunk's elements start."""
        if chunk not in self._starts:
            head, tail = frame(chunk.dtype, chunk.shape)
            nbytes = math.prod(chunk.shape) * chunk.dtype.itemsize
            found = torch.empty(len(head), dtype=torch.uint8)
            if len(head) + nbytes + len(tail) == chunk.length:
                self._files.read(chunk.file, chunk.start, found, key)
            same = found.numpy().tobytes() == head
            if self._prove:
                check_bytes(chunk.file, chunk.start, chunk.length, key)
            self._starts[chunk] = chunk.start + (
                len(head) if same else first_byte(chunk.file, chunk.start, chunk.length, chunk.dtype, chunk.shape, key)
            )
        return self._starts[chunk]

    def close(self) -> None:
        self._files.close()


class Writer:
    """A checkpoint whose tensors are written a few rows at a time; all places are known before the first is."""

    def __init__(self, folder: Path, parts: Iterable[tuple[Part, torch.dtype]], objects: Iterable[str]) -> None:
        self.folder = folder
        self._files = Files(os.O_RDWR | os.O_CREAT)
        self._objects = tuple(objects)
        self._stored: dict[Part, Stored] = {}
        parts = list(parts)
        sizes = [0] * _file_count(sum(math.prod(part.shape) * dtype.itemsize for part, dtype in parts))
        empty = io.BytesIO()
        torch.save([None], empty)
        self._object = empty.getvalue()
        sizes[0] = len(self._object) if self._objects else 0
        for part, dtype in parts:
            number = sizes.index(min(sizes))  # threads that write to different files do not wait for one another
            head, tail = frame(dtype, part.shape)
            length = len(head) + math.prod(part.shape) * dtype.itemsize + len(tail)
            file = folder / f"__0_{number}.distcp"
            self._stored[part] = Stored(part.offset, part.shape, dtype, file, sizes[number], length)
            sizes[number] += length
        self.nbytes = sum(sizes)

    def write(self, part: Part, row: int, rows: torch.Tensor) -> None:
        self._files.write(*self._place(part, row), rows)

    def read(self, part: Part, row: int, into: torch.Tensor) -> None:
        self._files.read(*self._place(part, row), into, part.key)

    def _place(self, part: Part, row: int) -> tuple[Path, int]:
        stored = self._stored[part]
        head, _ = frame(stored.dtype, stored.shape)
        return stored.file, stored.start + len(head) + row * part.row_elements * stored.dtype.itemsize

    def finish(self) -> None:
        """All tensors are written: what frames them, and what lists them. Everything is on the disk afterwards."""
        if self._objects:
            self._write(self.folder / "__0_0.distcp", 0, self._object)
        for stored in self._stored.values():
            head, tail = frame(stored.dtype, stored.shape)
            self._write(stored.file, stored.start, head)
            self._write(stored.file, stored.start + stored.length - len(tail), tail)
        self._files.close(sync=True)
        torch.save({}, self.folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        with (self.folder / METADATA_FILE).open("wb") as file:
            pickle.dump(self._metadata(), file)
            file.flush()
            os.fsync(file.fileno())

    def _write(self, file: Path, start: int, data: bytes) -> None:
        self._files.write(file, start, torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _metadata(self) -> Metadata:
        tensors: dict[str, Any] = {key: BytesStorageMetadata() for key in self._objects}
        places: dict[MetadataIndex, _StorageInfo] = {
            MetadataIndex(key): _StorageInfo("__0_0.distcp", 0, len(self._object)) for key in self._objects
        }
        for part, stored in self._stored.items():
            if part.key not in tensors:
                properties = TensorProperties(dtype=stored.dtype)
                tensors[part.key] = TensorStorageMetadata(properties, torch.Size(part.whole), [])
            chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape))
            tensors[part.key].chunks.append(chunk)
            index = MetadataIndex(part.key, chunk.offsets)
            places[index] = _StorageInfo(stored.file.name, stored.start, stored.length)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)

    def close(self) -> None:
        self._files.close()


def _file_count(nbytes: int) -> int:
    """16 files from 4 GiB on, none of them larger than 4 GiB."""
    return max(1, min(16, nbytes >> 28), -(-nbytes >> 32))


def _size(file: Path, key: str) -> int:
    try:
        return file.stat().st_size
    except OSError:
        raise WeightsError(f"{file}: missing, and {key} is stored in it") from None


def _ravel(position: Iterable[int], shape: Shape) -> int:
    flat = 0
    for index, size in zip(position, shape, strict=False):
        flat = flat * size + index
    return flat
