"""A machine without a GPU: gloo, one device, megatron-core adapted by megatron_cpu.py."""

from __future__ import annotations

import resource
import sys

import torch

from megatron_vespo.platform import Accelerator, DistributedBackend, LayerSpecKind, PlatformError, PlatformName
from megatron_vespo.platform.ipc import IpcHandle


class CpuPlatform:
    name: PlatformName = "cpu"
    distributed_backend: DistributedBackend = "gloo"
    accelerators_per_rank = 0
    holds_what_it_sends = False
    has_own_memory = False

    @property
    def layer_spec_kind(self) -> LayerSpecKind:
        return "local"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def fused_gradient_accumulation(self) -> bool:
        return False

    def prepare_megatron(self, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        # phi and Adam's second moments reach denormals, and a CPU computes those many times slower.
        torch.set_flush_denormal(True)
        from megatron_vespo.platform import adam, megatron_cpu

        megatron_cpu.install()
        adam.install()

    def seed(self, seed: int) -> None:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def matmul_float32(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # torch's CPU product of bfloat16 rounds its result to bfloat16; it has no out_dtype.
        return a.float() @ b.float()

    def accelerators(self) -> list[Accelerator]:
        return []

    def try_collective(self) -> str | None:
        return None

    def release_cached_memory(self) -> None:
        pass

    def share_memory(self, memory: torch.Tensor) -> IpcHandle:
        raise PlatformError("there is no device memory to share on a CPU")

    def open_memory(self, handle: IpcHandle) -> torch.Tensor:
        raise PlatformError(f"memory of device {handle.device} cannot be opened on a CPU: there is no CUDA here")

    def peak_memory_bytes(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_peak_memory(self) -> None:
        pass

    def synchronize(self) -> None:
        pass
