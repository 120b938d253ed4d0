"""The one door to what differs between a CPU and a GPU machine. Everything else asks ``current()``."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Literal, NamedTuple, Protocol

import torch

from megatron_vespo.platform.ipc import IpcHandle

PlatformName = Literal["cpu", "cuda"]
DistributedBackend = Literal["gloo", "nccl"]
LayerSpecKind = Literal["local", "transformer_engine"]


class Accelerator(NamedTuple):
    """A GPU that this process sees."""

    name: str
    free_bytes: int
    total_bytes: int


class Platform(Protocol):
    """What the rest of the project may ask about the device it runs on."""

    name: PlatformName
    distributed_backend: DistributedBackend

    @property
    def device(self) -> torch.device:
        """Where this process keeps its tensors."""

    holds_what_it_sends: bool
    """Whether a tensor's memory may be given up while a send of it is under way (gloo reads whatever is there then)."""

    accelerators_per_rank: int
    """GPUs that a trainer rank, or a tensor-parallel rank of an engine, takes of its node."""

    @property
    def layer_spec_kind(self) -> LayerSpecKind:
        """Which of megatron-core's layer specs ``layer_spec: auto`` means here."""

    @property
    def fused_gradient_accumulation(self) -> bool:
        """Whether Apex's kernel that adds a weight gradient into the main gradient is installed."""

    def prepare_megatron(self, threads: int | None = None) -> None:
        """Makes megatron-core usable in this process; call it before anything of it runs.

        ``threads``: CPU threads of torch; None leaves torch's own choice (OMP_NUM_THREADS). Safe to call twice.
        Raises PlatformError where the installed megatron-core is not one that this project knows.
        """

    def seed(self, seed: int) -> None:
        """Seeds torch on this device, and megatron-core's tensor- and expert-parallel generators.

        Needs ``megatron.core.parallel_state`` to be initialised.
        """

    def matmul_float32(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b`` in float32, whatever their dtype: sums of a low-precision product that are never rounded to it."""

    has_own_memory: bool
    """Whether tensors lie in memory of the device, which another process on it could use, and not in the host's."""

    def release_cached_memory(self) -> None:
        """What torch keeps of freed device memory goes back to the device, for other processes."""

    def share_memory(self, memory: torch.Tensor) -> IpcHandle:
        """For one opening by one other process of this machine; ``memory`` must outlive it. Raises PlatformError where
        a device has no memory of its own: there is shared memory for that (weights/transports/shared_memory.py)."""

    def open_memory(self, handle: IpcHandle) -> torch.Tensor:
        """uint8 [size]: another process's memory, read where it lies. Raises PlatformError where this process cannot
        see the device."""

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: device memory on CUDA (since reset_peak_memory), resident set on a CPU."""

    def reset_peak_memory(self) -> None:
        """Starts peak_memory_bytes anew (the resident set of a CPU process cannot be reset: a no-op there)."""

    def accelerators(self) -> list[Accelerator]:
        """All that this process sees; none on a CPU."""

    def try_collective(self) -> str | None:
        """A sum over one rank by the distributed backend, in a process that has no process group: its version; None
        where it needs no trying. Raises RuntimeError with the backend's own words where it fails."""

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read afterwards measures its work."""


class PlatformError(RuntimeError):
    """This machine, or the installed version of a library, is not one that the project knows how to run on."""


UPSTREAM_NOTES = {
    r".*(Apex|Transformer Engine).*": "half a dozen notes that they are absent; current() decides what follows from it",
    r"full scope is deprecated.*": "megatron-core on its own default for CUDA graphs, which nothing here uses",
    r"`torch\.distributed\..*` is deprecated.*": "megatron-core calls the older name",
    r"`load_state_dict` is deprecated.*": "megatron-core calls the older name",
    r"Please use DTensor instead.*": "megatron-core's distributed checkpoints are made of its predecessor",
    r"The \.grad attribute of a Tensor that is not a leaf.*": "megatron-core's optimizer asks whether there is one",
}
"""Warnings of megatron-core 0.16.1 that its user can do nothing about, and why they say nothing."""


def silence_upstream_warnings() -> None:
    """Call before megatron.core is imported."""
    for message in UPSTREAM_NOTES:
        warnings.filterwarnings("ignore", message=message)


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def has_apex() -> bool:
    return importlib.util.find_spec("apex") is not None


@cache
def current() -> Platform:
    """The platform of this process: CUDA if torch sees a device, else the CPU."""
    if torch.cuda.is_available():
        from megatron_vespo.platform.cuda import CudaPlatform

        return CudaPlatform()
    from megatron_vespo.platform.cpu import CpuPlatform

    return CpuPlatform()
