"""A digest of one tensor's exact bytes: what a saved folder and a weight sync are proven with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash

ALGORITHM = "xxh3_128"


def checksum(tensor: torch.Tensor) -> str:
    """32 hex digits over dtype, shape and bytes (row-major), so that -0.0 differs from 0.0 and a NaN equals itself."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combined(checksums: Mapping[str, str]) -> str:
    """One digest of a whole model's: which tensors there are, and each one's bytes."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(checksums.items()))
    return xxhash.xxh3_128(lines.encode()).hexdigest()
