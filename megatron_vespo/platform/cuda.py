"""A machine with NVIDIA GPUs: NCCL, Transformer Engine's layer spec where it is installed."""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.distributed as dist

from megatron_vespo.platform import (
    Accelerator,
    DistributedBackend,
    LayerSpecKind,
    PlatformError,
    PlatformName,
    has_transformer_engine,
)
from megatron_vespo.platform.ipc import IpcHandle


class CudaPlatform:
    name: PlatformName = "cuda"
    distributed_backend: DistributedBackend = "nccl"
    accelerators_per_rank = 1
    has_own_memory = True
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

    def release_cached_memory(self) -> None:
        torch.cuda.ipc_collect()  # blocks that another process had open, and has closed
        torch.cuda.empty_cache()

    def share_memory(self, memory: torch.Tensor) -> IpcHandle:
        assert memory.dtype == torch.uint8 and memory.is_contiguous()
        # (index, handle of the allocation, bytes of the storage, its place in the allocation, ...): what
        # torch.multiprocessing pickles of a CUDA tensor. The index is this process's; the device's UUID is everyone's.
        index, *fields = memory.untyped_storage()._share_cuda_()
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return IpcHandle(*(uuid, *fields, memory.storage_offset(), memory.numel()))

    def open_memory(self, handle: IpcHandle) -> torch.Tensor:
        devices = range(torch.cuda.device_count())
        uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in devices]
        if handle.device not in uuids:
            raise PlatformError(
                f"memory of device {handle.device} cannot be opened by this process, which sees {', '.join(uuids)}: "
                "add the sender's device to its CUDA_VISIBLE_DEVICES, or set sync.transport to shared_memory"
            )
        torch.cuda.init()
        storage = torch.UntypedStorage._new_shared_cuda(uuids.index(handle.device), *handle.storage_fields())
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return whole[handle.start : handle.start + handle.length]

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def accelerators(self) -> list[Accelerator]:
        devices = range(torch.cuda.device_count())
        return [Accelerator(torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)) for i in devices]

    def try_collective(self) -> str | None:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
        dist.destroy_process_group()
        return "NCCL " + ".".join(str(part) for part in torch.cuda.nccl.version())

    def synchronize(self) -> None:
        torch.cuda.synchronize()
