"""A digest of one tensor's exact bytes: what a saved folder and a weight sync are proven with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xxhash

ALGORITHM = "xxh3_128"


class Digest:
    """Of a tensor whose rows come in order, a few at a time; what :func:`checksum` gives for the whole."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self._digest = xxhash.xxh3_128(f"{dtype}{list(shape)}".encode())

    def update(self, rows: torch.Tensor) -> None:
        self._digest.update(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def checksum(tensor: torch.Tensor) -> str:
    """32 hex digits over dtype, shape and bytes (row-major), so that -0.0 differs from 0.0 and a NaN equals itself."""
    digest = Digest(tensor.dtype, tensor.shape)
    digest.update(tensor)
    return digest.hexdigest()


def combined(checksums: Mapping[str, str]) -> str:
    """One digest of a whole model's: which tensors there are, and each one's bytes."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(checksums.items()))
    return xxhash.xxh3_128(lines.encode()).hexdigest()
