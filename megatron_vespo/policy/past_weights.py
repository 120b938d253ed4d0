"""Weights of earlier versions, kept in host memory, so that log pi_old can be computed under those that sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class PastWeights:
    """One rank's: copies of what its chunks compute with, by weight version.

    A copy is of the model's own precision (the optimizer's masters are not in it) and of this rank's shard: what a
    rank holds is (versions kept) x (bytes of its parameters).
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._kept: dict[int, list[torch.Tensor]] = {}

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(self._kept)

    def keep(self, version: int, oldest: int) -> None:
        """Copy the weights as they are now, and forget those of versions before ``oldest``."""
        self._kept = {kept: copies for kept, copies in self._kept.items() if kept >= oldest}
        self._kept[version] = [tensor.detach().to("cpu", copy=True) for tensor in self._tensors()]

    @contextmanager
    def in_place(self, version: int) -> Iterator[None]:
        """The model computes with the weights of ``version`` meanwhile. Raises KeyError with a message where they are
        not kept."""
        if version not in self._kept:
            raise KeyError(
                f"the weights of version {version} are not kept (there are {sorted(self._kept)}): a token is older "
                "than asynchronous.max_staleness allows"
            )
        now = [tensor.detach().clone() for tensor in self._tensors()]
        try:
            self._load(self._kept[version])
            yield
        finally:
            self._load(now)

    def _tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self._chunks:
            yield from chunk.parameters()
            yield from chunk.buffers()

    @torch.no_grad()
    def _load(self, copies: Sequence[torch.Tensor]) -> None:
        for tensor, copy in zip(self._tensors(), copies, strict=True):
            tensor.copy_(copy)
