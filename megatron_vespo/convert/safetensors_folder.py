"""An HF folder as a place to read tensors from, and one to write them to, a few rows at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vespo.convert.files import Files
from megatron_vespo.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantise_blocks
from megatron_vespo.weights.hf_folder import INDEX_FILE
from megatron_vespo.weights.mapping import Shape, WeightsError
from megatron_vespo.weights.save import CHECKSUM_FILE

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # as in the safetensors library


@dataclass(frozen=True, slots=True)
class Info:
    """A tensor, and where it is."""

    dtype: torch.dtype
    shape: Shape
    file: Path
    start: int
    """Byte of the file at which its elements start."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HfReader:
    """The tensors of a folder. Those in blocks of fp8 are given as the weights that they stand for.

    Raises WeightsError, at once, for a file that is missing, truncated or not in the format, for a tensor that the
    index names and its file lacks, for a dtype that is not floating point, and for fp8 not in blocks of 128 x 128.
    """

    def __init__(self, folder: Path, *, dequantised: torch.dtype | None = torch.bfloat16) -> None:
        """``dequantised``: the dtype of weights given for fp8; None: values and scales are given as they are stored."""
        self.folder = folder
        self._files = Files()
        self.stored = _stored(folder)
        self.checksums = read_checksums(folder)
        """Of what is stored, where the folder tells them."""
        self.tensors = dict(self.stored)
        self._scales: dict[str, str] = {}
        self._dequantised = dequantised
        if dequantised is not None:
            self._pair_scales(dequantised)

    @property
    def is_fp8(self) -> bool:
        return any(info.dtype == torch.float8_e4m3fn for info in self.stored.values())

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.stored[name].dtype

    def read(self, name: str, row: int, into: torch.Tensor) -> torch.Tensor:
        """Rows from ``row`` on, as many as ``into`` (contiguous, of the stored dtype) has: itself, or where the tensor
        is in fp8 blocks what it stands for; ``row`` is then a multiple of 128."""
        info = self.stored[name]
        self._files.read(info.file, info.start + row * info.row_bytes, into, name)
        if name not in self._scales:
            return into
        assert self._dequantised is not None
        scales = self.stored[self._scales[name]]
        blocks = torch.empty(-(-len(into) // BLOCK), *scales.shape[1:], dtype=scales.dtype)
        self._files.read(scales.file, scales.start + row // BLOCK * scales.row_bytes, blocks, self._scales[name])
        return dequantise_blocks(into, blocks.float(), self._dequantised)

    def checksum(self, name: str) -> str | None:
        """Of a tensor that is given as it is stored, if the folder tells it."""
        return None if name in self._scales else self.checksums.get(name)

    def where(self, name: str) -> str:
        return f"{self.stored[name].file}: {name}"

    def close(self) -> None:
        self._files.close()

    def _pair_scales(self, dtype: torch.dtype) -> None:
        for name, info in self.stored.items():
            if info.dtype != torch.float8_e4m3fn:
                continue
            scales = name + SCALE_SUFFIX
            blocks = tuple(-(-size // BLOCK) for size in info.shape)
            if scales not in self.stored or len(blocks) != 2 or self.stored[scales].shape != blocks:
                found = list(self.stored[scales].shape) if scales in self.stored else "missing"
                raise WeightsError(
                    f"{info.file}: {name} is fp8 of shape {list(info.shape)}, and its scales {scales} are {found}; "
                    f"only blocks of {BLOCK} x {BLOCK} are read, whose scales have shape {list(blocks)}"
                )
            self._scales[name] = scales
            del self.tensors[scales]
            self.tensors[name] = Info(dtype, info.shape, info.file, info.start)


class HfWriter:
    """Files of safetensors whose sizes and headers are known before the first tensor is written."""

    def __init__(
        self, folder: Path, tensors: Sequence[tuple[str, torch.dtype, Shape]], max_shard_bytes: int = 4 << 30
    ) -> None:
        self.folder = folder
        self._files = Files(os.O_RDWR | os.O_CREAT)
        shards = _shards(tensors, max_shard_bytes)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        self.tensors: dict[str, Info] = {}
        self._headers: dict[Path, bytes] = {}
        for file, shard in zip(names, shards, strict=True):
            self._headers[folder / file] = self._lay_out(folder / file, shard)
        self.total = sum(info.nbytes for info in self.tensors.values())
        self.nbytes = self.total + sum(map(len, self._headers.values()))

    def _lay_out(self, file: Path, shard: list[tuple[str, torch.dtype, Shape]]) -> bytes:
        # The widest elements first, so that each tensor starts where its type may.
        shard = sorted(shard, key=lambda tensor: -tensor[1].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in shard:
            nbytes = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        first = 8 + len(text)
        for name, dtype, shape in shard:
            self.tensors[name] = Info(dtype, shape, file, first + header[name]["data_offsets"][0])
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, row: int, rows: torch.Tensor) -> None:
        info = self.tensors[name]
        self._files.write(info.file, info.start + row * info.row_bytes, rows)

    def read(self, name: str, row: int, into: torch.Tensor) -> None:
        info = self.tensors[name]
        self._files.read(info.file, info.start + row * info.row_bytes, into, name)

    def finish(self) -> None:
        """All tensors are written: headers and index. Everything is on the disk afterwards."""
        for file, header in self._headers.items():
            self._files.write(file, 0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        self._files.close(sync=True)
        if len(self._headers) > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {name: info.file.name for name, info in self.tensors.items()},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        self._files.close()


def _shards(
    tensors: Iterable[tuple[str, torch.dtype, Shape]], largest: int
) -> list[list[tuple[str, torch.dtype, Shape]]]:
    shards: list[list[tuple[str, torch.dtype, Shape]]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = math.prod(tensor[2]) * tensor[1].itemsize
        if shards[-1] and size + nbytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _stored(folder: Path) -> dict[str, Info]:
    index, single = folder / INDEX_FILE, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise WeightsError(
                f"{folder}: neither {INDEX_FILE} nor {single.name} is there; give the folder of an HF model"
            )
        return _header(single)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: not an index of safetensors ({error!r})") from None
    found: dict[str, Info] = {}
    for file in dict.fromkeys(weight_map.values()):
        found |= _header(folder / file)
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise WeightsError(f"{name}: {index} says it is in {folder / file}, and it is not")
    return found


def _header(file: Path) -> dict[str, Info]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise WeightsError(
                    f"{file}: says that its header has {length} bytes, and has {size} in all: truncated or "
                    "not safetensors"
                )
            header: dict[str, Any] = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        return {name: _info(file, size, 8 + length, name, **entry) for name, entry in header.items()}
    except OSError as error:
        raise WeightsError(f"{file}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{file}: its header is corrupted ({error})") from None


def _info(file: Path, size: int, first: int, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> Info:
    if dtype not in DTYPES:
        raise WeightsError(f"{file}: {name} is stored as {dtype}; only {sorted(DTYPES)} are read")
    info = Info(DTYPES[dtype], tuple(shape), file, first + data_offsets[0])
    if data_offsets[1] - data_offsets[0] != info.nbytes or data_offsets[0] < 0:
        raise WeightsError(f"{file}: {name} of {dtype} {shape} has bytes {data_offsets}: the header is corrupted")
    if first + data_offsets[1] > size:
        raise WeightsError(f"{file}: has {size} bytes, and {name} reaches to byte {first + data_offsets[1]}: truncated")
    return info


def read_checksums(folder: Path) -> dict[str, str]:
    """Of the tensors of a folder by name, where it has our list; else {}."""
    file = folder / CHECKSUM_FILE
    if not file.is_file():
        return {}
    try:
        return {name: entry["checksum"] for name, entry in json.loads(file.read_text())["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file}: not a list of checksums ({error!r}); remove it to go on without") from None
