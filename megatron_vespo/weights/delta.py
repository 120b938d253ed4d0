"""Only what changed of a tensor, lossless: where its bits differ from the previous version's, and by how much.

A tensor is taken as integers of its element size, so that -0.0, NaN payloads and denormals are numbers like any other.
Two arrays describe a change: ``gaps``, how many unchanged elements lie before each listed one, and ``changes``, what to
add to its integer (wrapping). Both take the narrowest type that holds them. A gap that its type cannot hold is
bridged by listing an element that did not change. After a policy-gradient update most changes are a unit or two in
the last place, and so a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

MOST = 8
"""A delta lists at most one element in so many: of more it takes longer to make than to send the tensor."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GAPS = (torch.uint8, torch.uint16)
_DTYPES = {str(t).removeprefix("torch."): t for t in (*_GAPS, *_INTEGERS.values())}


@dataclass(frozen=True, slots=True)
class Delta:
    """What turns one version of a tensor into the next."""

    gaps: torch.Tensor
    """[listed] uint8 or uint16: elements between this listed one and the one before."""
    changes: torch.Tensor
    """[listed] int8 to int64, at most as wide as an element."""

    @property
    def nbytes(self) -> int:
        return self.gaps.nbytes + self.changes.nbytes

    def pack(self) -> tuple[str, torch.Tensor]:
        """(what :meth:`unpack` must be told, uint8 [nbytes])."""
        kinds = ":".join(str(t.dtype).removeprefix("torch.") for t in (self.gaps, self.changes))
        # The wider array first: it stays aligned.
        return f"{len(self.gaps)}:{kinds}", torch.cat([self.changes.view(torch.uint8), self.gaps.view(torch.uint8)])

    @classmethod
    def unpack(cls, description: str, payload: torch.Tensor) -> Delta:
        count, gaps, changes = description.split(":")
        size = int(count) * _DTYPES[changes].itemsize
        parts = payload[:size].clone(), payload[size:].clone()  # a clone starts where its wider type may
        return cls(parts[1].view(_DTYPES[gaps]), parts[0].view(_DTYPES[changes]))


def encode(old: torch.Tensor, new: torch.Tensor) -> Delta | None:
    """The delta from ``old`` to ``new`` (same dtype, shape and device), or None where ``new`` had better be sent whole.

    That is where more than one element in eight changed, or where it is no larger.
    """
    before, after = _integers(old), _integers(new)
    places = _places(before, after)
    if MOST * len(places) > max(new.numel(), MOST):
        return None
    # One size wider, a difference does not wrap; that of 64-bit integers does, and wraps back.
    wide = torch.int32 if new.element_size() < 4 else torch.int64
    changes = after[places].to(wide) - before[places].to(wide)
    changes = changes.to(_narrowest(changes, new.element_size()))
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    # A bridge lists one more element: its gap and a change of 0.
    sizes = {
        gap: (len(gaps) + int((gaps // _reach(gap)).sum())) * (gap.itemsize + changes.element_size()) for gap in _GAPS
    }
    best = min(sizes, key=lambda gap: sizes[gap])
    return Delta(*_bridged(gaps, changes, best)) if sizes[best] < new.nbytes else None


def apply(old: torch.Tensor, delta: Delta) -> None:
    """Turn ``old`` (contiguous) into the new version, in place. Raises ValueError where the delta reaches beyond it."""
    assert old.is_contiguous(), "else a copy of it would be changed"
    places = (delta.gaps.to(old.device, torch.int64) + 1).cumsum(0) - 1
    flat = _integers(old)
    if len(places) and int(places[-1]) >= len(flat):
        raise ValueError(f"a delta for at least {int(places[-1]) + 1} elements, the tensor has {len(flat)}")
    flat[places] += delta.changes.to(flat)


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])


def _places(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """int64 [changed]: where they differ."""
    if before.is_cpu:  # numpy does it in a third of torch's time
        return torch.from_numpy(np.flatnonzero(before.numpy() != after.numpy()))
    return (before != after).nonzero().squeeze(1)


def _reach(gap: torch.dtype) -> int:
    """How much further one listed element with the longest gap leads."""
    return torch.iinfo(gap).max + 1


def _bridged(gaps: torch.Tensor, changes: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaps of this dtype, and the changes with a 0 for each element listed only to bridge one."""
    bridges = gaps // _reach(dtype)
    if not bridges.any():
        return gaps.to(dtype), changes
    # Listed one after another: a place's bridges, then the place.
    ends = (bridges + 1).cumsum(0) - 1
    listed = int(ends[-1]) + 1
    all_gaps = gaps.new_full((listed,), _reach(dtype) - 1)
    all_gaps[ends] = gaps % _reach(dtype)
    all_changes = changes.new_zeros(listed)
    all_changes[ends] = changes
    return all_gaps.to(dtype), all_changes


def _narrowest(changes: torch.Tensor, width: int) -> torch.dtype:
    if not len(changes):
        return torch.int8
    low, high = (int(bound) for bound in changes.aminmax())
    for size, dtype in _INTEGERS.items():
        if size == width or (torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max):
            return dtype
    raise AssertionError("an element is one of these sizes")
