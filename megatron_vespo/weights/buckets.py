"""A stream of tensors laid end to end in one buffer of bytes, a bucket at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Named = tuple[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a bucket. The first starts at byte 0, each other where the one before ends."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Bucket:
    flat: torch.Tensor
    """uint8 [bytes]"""
    specs: list[TensorSpec]


def fill_buckets(
    tensors: Iterable[Named], buffer: Callable[[int], torch.Tensor], bucket_bytes: int
) -> Iterator[Bucket]:
    """Each tensor is copied as it comes, so that beside the buffer no more than one is held.

    ``buffer(n)`` gives the memory of the next bucket, uint8 [n]: ``bucket_bytes``, or more for a single tensor that is
    larger, which then is a bucket of its own.
    """
    memory, used, specs = torch.empty(0, dtype=torch.uint8), 0, list[TensorSpec]()
    for name, tensor in tensors:
        spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        # A receiver views its bytes where they lie, which must be a multiple of the element size.
        if specs and (used + spec.nbytes > bucket_bytes or used % tensor.element_size()):
            yield Bucket(memory[:used], specs)
            used, specs = 0, []
        if not specs:
            memory = buffer(max(spec.nbytes, bucket_bytes))
        _view(memory[used : used + spec.nbytes], spec).copy_(tensor)
        used += spec.nbytes
        specs.append(spec)
        del tensor  # before the next is made
    if specs:
        yield Bucket(memory[:used], specs)


class ByTurns(Generic[T]):
    """Two of what ``make(size)`` makes, handed out by turns; one of another size is let go and made anew."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self.made: list[tuple[int, T]] = []

    def next(self, size: int) -> T:
        if len(self.made) == 2:
            oldest = self.made.pop(0)
            if oldest[0] == size:
                self.made.append(oldest)
                return oldest[1]
            del oldest  # before there is a third
        self.made.append((size, self._make(size)))
        return self.made[-1][1]


def unpack(flat: torch.Tensor, specs: Iterable[TensorSpec]) -> Iterator[Named]:
    """The tensors of a bucket, as views of ``flat``. Raises ValueError where they need another number of bytes."""
    start = 0
    for spec in specs:
        stop = start + spec.nbytes
        if stop > len(flat):
            raise ValueError(f"{spec.name} ends at byte {stop} of a bucket of {len(flat)}")
        yield spec.name, _view(flat[start:stop], spec)
        start = stop
    if start != len(flat):
        raise ValueError(f"a bucket of {len(flat)} bytes holds {start} bytes of tensors")


def _view(flat: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return flat.view(spec.dtype).view(spec.shape)
