"""Both ends of a weight sync between processes: what a tensor's name tells the receiver, checksums, deltas undone.

    NAME                    load it
    keep:NAME               load it and keep a copy, the base of later deltas; the first of a sync clears all older ones
    replace:NAME            the same, older copies stay: a tensor of which too much changed for a delta
    delta:DESCRIPTION:NAME  apply to the copy, load the result

Copies are in host memory, one in the sender and one in each receiving process. Whether both are of the same version is
not a matter of numbers, which a restarted run counts anew: they have the same combined checksum, or there is no delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron_vespo.weights.buckets import Named
from megatron_vespo.weights.checksum import checksum, combined
from megatron_vespo.weights.delta import Delta, apply, encode


class Outgoing:
    """The sender's end. ``checksums`` are those of the version that was sent last, after any quantisation."""

    def __init__(self, *, delta: bool) -> None:
        self.delta = delta
        self.checksums: dict[str, str] = {}
        self.full_bytes = 0
        """Of the last version, had all of it been sent."""
        self._kept: dict[str, torch.Tensor] = {}

    def base(self) -> str | None:
        """Combined checksum of what a delta would be made against; None where nothing is kept."""
        return combined(self.checksums) if self._kept else None

    def encode(self, tensors: Iterable[Named], *, full: bool) -> Iterator[Named]:
        """What to send of a version, named for the receiver. ``full``: every tensor whole, whatever was sent before."""
        if full or not self.delta:
            self._kept.clear()
            self.checksums.clear()
        self.full_bytes = 0
        for name, tensor in tensors:
            before, self.checksums[name] = self.checksums.get(name), checksum(tensor)
            self.full_bytes += tensor.nbytes
            if not self.delta:
                yield name, tensor
            elif full:
                self._kept[name] = _copy(tensor)
                yield f"keep:{name}", tensor
            elif self.checksums[name] != before:
                yield self._change(name, tensor)
            del tensor  # before the next is made

    def _change(self, name: str, tensor: torch.Tensor) -> Named:
        delta = encode(self._kept[name].to(tensor.device), tensor)
        if delta is None:
            self._kept[name].copy_(tensor)
            return f"replace:{name}", tensor
        apply(self._kept[name], delta)
        description, payload = delta.pack()
        return f"delta:{description}:{name}", payload


class Arrivals:
    """The receiver's end, inside an engine's process. Not thread-safe."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._checksums: dict[str, str] = {}
        self._first = False

    def begin(self) -> str:
        """A sync starts. Returns the combined checksum of what is kept: the only base that a delta may have."""
        self._checksums = {name: digest for name, digest in self._checksums.items() if name in self._kept}
        self._first = True
        return combined(self._checksums)

    def accept(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """What the engine is to load: HF names and whole tensors, whose checksums are taken here.

        Raises ValueError for a delta to a tensor that is not kept, or that does not fit it.
        """
        for wire_name, tensor in tensors:
            kind, _, rest = wire_name.rpartition(":")
            name, whole = self._undo_delta(kind, rest, tensor) if kind else self._plain(rest, tensor)
            self._checksums[name] = checksum(whole)
            yield name, whole

    def end(self) -> dict[str, str]:
        """Checksum of each tensor that arrived in this sync or is kept."""
        return dict(self._checksums)

    def _plain(self, name: str, tensor: torch.Tensor) -> Named:
        if self._kept:
            self.forget()
        return name, tensor

    def _undo_delta(self, kind: str, name: str, tensor: torch.Tensor) -> Named:
        if kind in ("keep", "replace"):
            if kind == "keep" and self._first:
                self.forget()
            self._first = False
            self._kept[name] = _copy(tensor)
            return name, tensor
        if name not in self._kept:
            raise ValueError(f"{name}: a delta came for it, and no copy of its last version is kept here")
        self._first = False
        apply(self._kept[name], Delta.unpack(kind.removeprefix("delta:"), tensor.cpu()))
        return name, self._kept[name]

    def forget(self) -> None:
        """Keep nothing: the engine has weights that did not come through here."""
        self._kept.clear()
        self._checksums.clear()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """In host memory, contiguous, so that a delta can be applied to it."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
