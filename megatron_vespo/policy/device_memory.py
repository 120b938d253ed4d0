"""What a rank of the trainer holds of its device's memory while it takes turns with an engine (cluster.colocate)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_vespo import platform

Held = Literal["everything", "weights", "nothing"]
"""weights: what a weight sync reads, and a forward pass."""


class TrainerMemory:
    """Weights; and beside them gradients and optimizer state. Given up, they wait in host memory, but for the
    gradients, which are zero at the start of an update. Where the device has no memory of its own (a CPU) there is
    nothing to move."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._weights, self._training = HostCopy(), HostCopy()

    def hold(self, held: Held) -> int:
        """Bytes moved or freed or taken."""
        if not platform.current().has_own_memory:
            return 0
        moved = 0
        if held != "everything":
            weights = {tensor.untyped_storage().data_ptr() for tensor in self._weight_tensors()}
            state = [t for t in _state_of(self._optimizer) if t.untyped_storage().data_ptr() not in weights]
            moved += self._training.give_up(_gradients_of(self._chunks), keep=False) + self._training.give_up(state)
        if held == "nothing":
            moved += self._weights.give_up(self._weight_tensors())
        platform.current().release_cached_memory()
        if held != "nothing":
            moved += self._weights.take_back()
        if held == "everything":
            moved += self._training.take_back()
        return moved

    def _weight_tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self._chunks:
            yield from chunk.module.parameters()
            yield from chunk.module.buffers()  # DDP has an attribute of that name


class HostCopy:
    """Of whole storages, so that every view of them (megatron-core's buffers are full of views) is valid again when
    they are back. What reads them meanwhile finds a storage of size 0."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] = []

    def give_up(self, tensors: Iterable[torch.Tensor], *, keep: bool = True) -> int:
        """Bytes freed. Without ``keep`` the contents are lost, and come back as zeros. Storages that are empty, or
        given up already, are left alone."""
        freed = 0
        for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values():
            size = storage.nbytes()
            if not size:
                continue
            copy = None
            if keep:
                # A pageable copy takes several times longer.
                copy = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                copy.copy_(_bytes_of(storage))
            storage.resize_(0)
            self._away.append((storage, size, copy))
            freed += size
        return freed

    def take_back(self) -> int:
        """Bytes taken."""
        taken = 0
        for storage, size, copy in self._away:
            storage.resize_(size)
            memory = _bytes_of(storage)
            memory.zero_() if copy is None else memory.copy_(copy)
            taken += size
        self._away.clear()
        return taken


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _gradients_of(chunks: Sequence[DistributedDataParallel]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data


def _state_of(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Float32 masters and moments. The masters of float32 weights may be the weights themselves."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:  # this rank has no parameters of the kind
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
