"""A stream of tensors laid end to end in one buffer of bytes, a bucket at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

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
    """uint8 [bytes], written over when the next bucket is asked for."""
    specs: list[TensorSpec]


def fill_buckets(
    tensors: Iterable[Named], buffer: Callable[[int], torch.Tensor], bucket_bytes: int
) -> Iterator[Bucket]:
    """Each tensor is copied as it comes, so that beside the buffer no more than one is held.

    ``buffer(n)``: memory for n bytes, uint8 [at least n]. It is asked for ``bucket_bytes``, and for more where a single
    tensor is larger, which then is a bucket of its own.
    """
    memory = buffer(bucket_bytes)
    used, specs = 0, list[TensorSpec]()
    for name, tensor in tensors:
        spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        # A receiver views its bytes where they lie, which must be a multiple of the element size.
        if specs and (used + spec.nbytes > bucket_bytes or used % tensor.element_size()):
            yield Bucket(memory[:used], specs)
            used, specs = 0, []
        if spec.nbytes > len(memory):
            memory = buffer(spec.nbytes)
        _view(memory[used : used + spec.nbytes], spec).copy_(tensor)
        used += spec.nbytes
        specs.append(spec)
    if specs:
        yield Bucket(memory[:used], specs)


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
