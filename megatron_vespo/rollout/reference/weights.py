"""Weights that come to the reference engine bucket by bucket: SGLang's routes, and one for memory of this machine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from safetensors import safe_open

from megatron_vespo.rollout.reference.body import Body, refusal
from megatron_vespo.rollout.reference.generator import Generator
from megatron_vespo.rollout.reference.parameters import parameters_by_hf_name
from megatron_vespo.rollout.reference.precision import rounded_weight
from megatron_vespo.weights.buckets import TensorSpec, unpack
from megatron_vespo.weights.checksum import checksum
from megatron_vespo.weights.fp8 import SCALE_SUFFIX, dequantise_blocks, is_block_quantised
from megatron_vespo.weights.groups import BroadcastGroup, connect_store
from megatron_vespo.weights.transports.place import open_place
from megatron_vespo.weights.wire import Arrivals

GROUP_TIMEOUT = timedelta(minutes=10)


class WeightUpdates:
    """Loads into the running model in place, while the generator stands still. Errors are ValueErrors."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._arrivals = Arrivals()
        self._groups: dict[str, BroadcastGroup] = {}
        self._targets: dict[str, torch.Tensor] | None = None
        """HF name -> the live parameter or part of one; None between updates."""
        self._rounds = False
        """Whether the engine computes with weights rounded to fp8."""
        self._unscaled: dict[str, torch.Tensor] = {}
        """fp8 values whose scales have not come yet."""
        self._lock = threading.Lock()

    def begin(self) -> str:
        """Returns the combined checksum of what is kept for deltas."""
        model = self.generator.begin_update().result()
        self._targets = parameters_by_hf_name(model.module)
        self._rounds = model.fp8.weights
        return self._arrivals.begin()

    def load(self, flat: torch.Tensor, specs: Iterable[TensorSpec]) -> None:
        with self._lock, torch.no_grad():
            for name, tensor in self._arrivals.accept(unpack(flat, specs)):
                self._copy(*self._scaled(name, tensor))

    def end(self) -> dict[str, str]:
        """Returns the checksum of each tensor that arrived."""
        unscaled, self._unscaled, self._targets = self._unscaled, {}, None
        self.generator.end_update().result()
        if unscaled:
            raise ValueError(f"{next(iter(unscaled))}: came in fp8 and without its scales")
        return self._arrivals.end()

    def join(self, name: str, address: str, port: int, rank: int, size: int) -> None:
        store = connect_store(address, port, GROUP_TIMEOUT)
        self._groups[name] = BroadcastGroup(name, store, rank, size, "gloo", GROUP_TIMEOUT)

    def leave(self, name: str) -> None:
        self._groups.pop(name, None)

    def receive(self, name: str, specs: list[TensorSpec]) -> None:
        if name not in self._groups:
            raise ValueError(f"this engine has not joined a group {name!r}")
        flat = torch.empty(sum(spec.nbytes for spec in specs), dtype=torch.uint8)
        self._groups[name].broadcast(flat)
        self.load(flat, specs)

    def replaced_by(self, folder: Path) -> dict[str, str]:
        """The model's weights are now those of an HF folder, of whose tensors this returns the checksums."""
        with self._lock:
            self._arrivals.forget()
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                found.update({name: checksum(tensors.get_tensor(name)) for name in tensors.keys()})  # noqa: SIM118
        return found

    def _scaled(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor | None]:
        """What there is to load: of an fp8 weight, all of it when its scales are there. An engine that rounds to fp8
        rounds what came otherwise."""
        if tensor.dtype == torch.float8_e4m3fn:
            self._unscaled[name] = tensor.clone()
            return name, None
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight in self._unscaled:
            return weight, dequantise_blocks(self._unscaled.pop(weight), tensor)
        return name, rounded_weight(tensor) if self._rounds and is_block_quantised(name) else tensor

    def _copy(self, name: str, tensor: torch.Tensor | None) -> None:
        if self._targets is None:
            raise ValueError("weights came outside begin_weight_update and end_weight_update")
        if tensor is None:
            return
        if name not in self._targets:
            raise ValueError(f"{name}: this model has no such weight")
        if self._targets[name].shape != tensor.shape:
            raise ValueError(f"{name}: came as {list(tensor.shape)}, is {list(self._targets[name].shape)} here")
        self._targets[name].copy_(tensor)


# --- routes ------------------------------------------------------------------------------------------------------


class GroupBody(Body):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str
    backend: Literal["gloo"]


class LeaveBody(Body):
    group_name: str


class BucketBody(Body):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    def specs(self) -> list[TensorSpec]:
        described = zip(self.names, self.dtypes, self.shapes, strict=True)
        return [TensorSpec(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in described]


class DistributedBody(BucketBody):
    group_name: str
    load_format: Literal["flattened_bucket"]
    flush_cache: bool = True


class PlaceBody(BucketBody):
    place: str


class VersionBody(Body):
    new_version: int
    abort_all_requests: Literal[False]


def weight_routes(updates: WeightUpdates) -> APIRouter:
    router = APIRouter()

    @router.post("/begin_weight_update")
    async def begin_weight_update() -> JSONResponse:
        return await _answer(lambda: json.dumps({"kept": updates.begin()}))

    @router.post("/end_weight_update")
    async def end_weight_update() -> JSONResponse:
        return await _answer(lambda: json.dumps({"checksums": updates.end()}))

    @router.post("/update_weight_version")
    async def update_weight_version(body: VersionBody) -> JSONResponse:
        return await _answer(lambda: updates.generator.set_version(body.new_version).result())

    @router.post("/init_weights_update_group")
    async def init_weights_update_group(body: GroupBody) -> JSONResponse:
        where = body.master_address, body.master_port, body.rank_offset, body.world_size
        return await _answer(lambda: updates.join(body.group_name, *where))

    @router.post("/destroy_weights_update_group")
    async def destroy_weights_update_group(body: LeaveBody) -> JSONResponse:
        return await _answer(lambda: updates.leave(body.group_name))

    @router.post("/update_weights_from_distributed")
    async def update_weights_from_distributed(body: DistributedBody) -> JSONResponse:
        return await _answer(lambda: updates.receive(body.group_name, body.specs()))

    @router.post("/update_weights_from_place")
    async def update_weights_from_place(body: PlaceBody) -> JSONResponse:
        specs = body.specs()
        size = sum(spec.nbytes for spec in specs)
        return await _answer(lambda: updates.load(open_place(body.place, size), specs))

    return router


async def _answer(act: Callable[[], str | None]) -> JSONResponse:
    """SGLang's answer, its message being what ``act`` returns. Off the event loop, which goes on answering."""
    try:
        message = await asyncio.to_thread(act)
    except (ValueError, OSError, RuntimeError) as error:
        return refusal(400, str(error))
    return JSONResponse({"success": True, "message": message or ""})
