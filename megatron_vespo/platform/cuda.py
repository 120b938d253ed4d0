"""A machine with NVIDIA GPUs: NCCL, Transformer Engine's layer spec where it is installed."""

from __future__ import annotations

import importlib.util
import os

import torch

from megatron_vespo.platform import DistributedBackend, LayerSpecKind, PlatformName, has_transformer_engine


class CudaPlatform:
    name: PlatformName = "cuda"
    distributed_backend: DistributedBackend = "nccl"
    accelerators_per_rank = 1
    holds_what_it_sends = True  # streams and record_stream see to it

    @property
    def layer_spec_kind(self) -> LayerSpecKind:
        return "transformer_engine" if has_transformer_engine() else "local"

    @property
    def device(self) -> torch.device:
        # Ray and torchrun both say which of the visible devices is this rank's; alone, it is the first.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    @property
    def fused_gradient_accumulation(self) -> bool:
        return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None

    def prepare_megatron(self, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        torch.cuda.set_device(self.device)
        from megatron_vespo.platform import adam

        adam.install()

    def seed(self, seed: int) -> None:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def matmul_float32(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        torch.cuda.synchronize()
