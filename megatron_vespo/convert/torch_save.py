"""What torch.save makes of one tensor: a head, the bytes in row-major order, and a tail (a zip archive)."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import torch

from megatron_vespo.weights.mapping import Shape, WeightsError


@lru_cache(maxsize=4096)
def frame(dtype: torch.dtype, shape: Shape) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of a contiguous CPU tensor.

    The checksums inside are not those of the bytes; torch.load does not look at them.
    """
    sink = _Sparse()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], sink))  # memory that is never touched
    nbytes = math.prod(shape) * dtype.itemsize
    [(start, stop)] = sink.holes()
    assert stop - start == nbytes, "torch.save frames tensors otherwise than this module knows"
    written = sink.bytes()
    return written[:start], written[start:]


def first_byte(path: Path, start: int, length: int, dtype: torch.dtype, shape: Shape, what: str) -> int:
    """Where in bytes ``start:start + length`` of a file, which some torch.save wrote, the elements start.

    Raises WeightsError, which names ``what``, where there is no row-major tensor of this dtype and shape.
    """
    with _opened(path, start, length, what) as (archive, record, first):
        [description] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        described = _Description(archive.open(description)).load()
    nbytes = math.prod(shape) * dtype.itemsize
    if described != ("storage", 0, shape, _contiguous(shape)) or record.file_size != nbytes:
        raise WeightsError(
            f"{path}: {what}, bytes {start} to {start + length}: holds {described} in {record.file_size} bytes, and "
            f"the checkpoint says {list(shape)} of {dtype}, row-major"
        )
    return first


def check_bytes(path: Path, start: int, length: int, what: str) -> None:
    """Raises WeightsError, which names ``what``, where a tensor's bytes are not those that torch.save wrote."""
    with _opened(path, start, length, what) as (_, record, first), path.open("rb") as file:
        file.seek(start + first)
        found, left = 0, record.file_size
        while left:
            data = file.read(min(left, 1 << 20))
            found, left = zlib.crc32(data, found), left - len(data)
        if found != record.CRC and record.CRC:  # 0: saved without
            raise WeightsError(
                f"{path}: {what}, bytes {start} to {start + length}: not those that torch.save's checksum (CRC-32) "
                "tells: the file is corrupted"
            )


@contextmanager
def _opened(path: Path, start: int, length: int, what: str) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo, int]]:
    """The archive in a stretch of a file, its record with the elements, and where in the stretch these start."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_Stretch(file, start, length)) as archive:
            [record] = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
            if record.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("compressed")
            file.seek(start + record.header_offset)
            header = file.read(30)
            name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            yield archive, record, record.header_offset + len(header) + name + extra
    except WeightsError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"{path}: {what}, bytes {start} to {start + length}: not a tensor that torch.save wrote ({error}): "
            "the file is corrupted"
        ) from None


def _contiguous(shape: Shape) -> Shape:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class _Description(pickle.Unpickler):
    """Of a saved tensor: ("storage", first element, shape, strides). Nothing that the pickle names is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, tuple(shape), tuple(strides))
        return lambda *_: (module, name)

    def persistent_load(self, _: Any) -> str:
        return "storage"


class _Stretch(io.RawIOBase):
    """Bytes ``start:start + length`` of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Sparse(io.RawIOBase):
    """A file of which only what is written takes memory."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, bytes]] = []
        self._at = 0

    def write(self, data: Any) -> int:
        if len(data):
            self._pieces.append((self._at, bytes(data)))
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence != os.SEEK_END
        self._at = offset if whence == os.SEEK_SET else self._at + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def holes(self) -> list[tuple[int, int]]:
        ends = [start + len(piece) for start, piece in self._pieces]
        return [(end, start) for end, (start, _) in zip(ends, self._pieces[1:], strict=False) if start > end]

    def bytes(self) -> bytes:
        return b"".join(piece for _, piece in self._pieces)
