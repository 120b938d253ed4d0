"""The HTTP face of the reference engine: the subset of SGLang's native API that our client speaks, JSON only."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_vespo.rollout.protocol import MemoryPart, PauseMode
from megatron_vespo.rollout.reference.batch import Result, Sequence
from megatron_vespo.rollout.reference.body import Body, refusal
from megatron_vespo.rollout.reference.generator import Generator
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.weights import WeightUpdates, weight_routes
from megatron_vespo.rollout.routing import encode_routing
from megatron_vespo.samples.records import RoutingShape


class SamplingBody(Body):
    max_new_tokens: int = Field(128, ge=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling_seed: int | None = None


class GenerateBody(Body):
    input_ids: list[list[int]]
    sampling_params: list[SamplingBody]
    rid: list[str]
    return_logprob: bool = False
    logprob_start_len: int = -1
    return_routed_experts: bool = False


class UpdateBody(Body):
    model_path: Path
    weight_version: str
    flush_cache: bool = True


class PauseBody(Body):
    mode: PauseMode = "abort"


class MemoryBody(Body):
    tags: frozenset[MemoryPart]


class AbortBody(Body):
    rid: str = ""
    abort_all: bool = False


def build_app(generator: Generator, dtype: torch.dtype, random_seed: int, key: str | None = None) -> FastAPI:
    """Routes over a running generator. ``random_seed`` starts the seeds of requests that bring none. With a ``key``
    only /health answers a request that does not bear it."""
    app = FastAPI(openapi_url=None)
    updates = WeightUpdates(generator)
    app.include_router(weight_routes(updates))
    unseeded = itertools.count(random_seed << 32)
    if key is not None:
        app.add_middleware(KeyCheck, key=key)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return refusal(500, repr(error))

    @app.get("/health")
    def health() -> Response:
        if generator.failure is not None:
            return refusal(503, f"the generator thread has died: {generator.failure!r}")
        return Response()

    @app.get("/model_info")
    def model_info() -> JSONResponse:
        return JSONResponse({"weight_version": str(generator.version)})

    @app.get("/server_info")
    async def server_info() -> JSONResponse:
        said = await asyncio.wrap_future(generator.describe())
        routes = generator.model.routers.shape is not None
        return JSONResponse(said | {"tp_size": 1, "enable_return_routed_experts": routes})

    @app.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> JSONResponse:
        sequences = _sequences(body, generator.model, unseeded)
        generator.submit(sequences)
        pending: set[asyncio.Future[Result]] = {asyncio.wrap_future(sequence.done) for sequence in sequences}
        while pending:
            _, pending = await asyncio.wait(pending, timeout=1.0)
            if pending and await request.is_disconnected():
                for sequence in sequences:
                    generator.abort(sequence.rid)
        shape = generator.model.routers.shape
        return JSONResponse([_answer(sequence, sequence.done.result(), shape) for sequence in sequences])

    @app.post("/update_weights_from_disk")
    async def update_weights_from_disk(body: UpdateBody) -> JSONResponse:
        try:
            version = int(body.weight_version)
            # Loaded beside the running weights; generation goes on until the swap, which nothing can fail any more.
            now = generator.model
            model = await asyncio.to_thread(ReferenceModel, body.model_path, dtype, now.context_length, now.fp8)
            _check_same_shape(generator.model, model)
            checksums = await asyncio.to_thread(updates.replaced_by, body.model_path)
        except (ValueError, OSError) as error:
            return refusal(400, str(error))
        try:
            await asyncio.wrap_future(generator.swap(model, version, recompute=body.flush_cache))
        except ValueError as error:
            return refusal(400, str(error))
        return JSONResponse({"success": True, "message": json.dumps({"checksums": checksums})})

    @app.post("/pause_generation")
    async def pause_generation(body: PauseBody) -> Response:
        await asyncio.wrap_future(generator.pause(body.mode))
        return Response()

    @app.post("/continue_generation")
    async def continue_generation() -> Response:
        await asyncio.wrap_future(generator.resume())
        return Response()

    @app.post("/release_memory_occupation")
    async def release_memory_occupation(body: MemoryBody) -> Response:
        return await _done(generator.give_up(body.tags))

    @app.post("/resume_memory_occupation")
    async def resume_memory_occupation(body: MemoryBody) -> Response:
        return await _done(generator.take_back(body.tags))

    @app.post("/abort_request")
    async def abort_request(body: AbortBody) -> Response:
        if body.abort_all or body.rid:
            await asyncio.wrap_future(generator.abort(None if body.abort_all else body.rid))
        return Response()

    return app


async def _done(future: Future[None]) -> Response:
    try:
        await asyncio.wrap_future(future)
    except ValueError as error:
        return refusal(400, str(error))
    return Response()


class KeyCheck:
    """Refuses what does not bear the key. Plain ASGI: FastAPI's own middleware hides a client's disconnection."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.expected):
                await refusal(401, "this engine wants a key")(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _sequences(body: GenerateBody, model: ReferenceModel, unseeded: itertools.count) -> list[Sequence]:
    if not len(body.input_ids) == len(body.sampling_params) == len(body.rid):
        raise HTTPException(400, "input_ids, sampling_params and rid differ in length")
    if body.return_routed_experts and model.routers.shape is None:
        raise HTTPException(400, "return_routed_experts: the model has no routers that this engine knows")
    sequences = []
    for rid, prompt, sampling in zip(body.rid, body.input_ids, body.sampling_params, strict=True):
        if not prompt or not all(0 <= token < model.vocab_size for token in prompt):
            raise HTTPException(400, f"{rid}: input_ids are empty or outside the vocabulary of {model.vocab_size}")
        if body.return_routed_experts and not sampling.max_new_tokens:
            raise HTTPException(400, f"{rid}: return_routed_experts with max_new_tokens 0; this engine scores without")
        if len(prompt) + sampling.max_new_tokens > model.context_length:
            raise HTTPException(
                400,
                f"{rid}: {len(prompt)} prompt tokens and max_new_tokens {sampling.max_new_tokens} exceed "
                f"the context length {model.context_length}",
            )
        sequences.append(
            Sequence(
                rid=rid,
                prompt=np.asarray(prompt, np.int64),
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_token_ids=() if sampling.ignore_eos else (*sampling.stop_token_ids, *model.eos_token_ids),
                seed=next(unseeded) if sampling.sampling_seed is None else sampling.sampling_seed,
                routing=body.return_routed_experts,
            )
        )
    return sequences


def _answer(sequence: Sequence, result: Result, shape: RoutingShape | None) -> dict[str, Any]:
    """SGLang's shape: log-probs as [logprob, token, text], version spans over the response."""
    finish: dict[str, Any] = {"type": result.finish_reason}
    if result.finish_reason == "stop":
        finish["matched"] = int(result.tokens[-1])
    tokens, logprobs = result.tokens.tolist(), result.logprobs.tolist()
    meta: dict[str, Any] = {
        "id": sequence.rid,
        "finish_reason": finish,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": len(tokens),
        "weight_version": str(result.version),
        "weight_versions": _spans(result.versions),
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)],
    }
    if result.prompt_logprobs is not None:
        scored = zip([None, *result.prompt_logprobs.tolist()], sequence.prompt.tolist(), strict=True)
        meta["input_token_logprobs"] = [[logprob, token, None] for logprob, token in scored]
    if result.routed_experts is not None and shape is not None:
        meta["routed_experts"] = encode_routing(result.routed_experts, shape)
    return {"output_ids": tokens, "meta_info": meta}


def _spans(versions: np.ndarray) -> list[dict[str, Any]]:
    edges = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    return [
        {"version": str(versions[start]), "start": start, "end": end}
        for start, end in itertools.pairwise(edges)
        if end > start
    ]


def _check_same_shape(old: ReferenceModel, new: ReferenceModel) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in old.module.state_dict().items()}
    for name, tensor in new.module.state_dict().items():
        if shapes.pop(name, None) != tuple(tensor.shape):
            raise ValueError(f"the new checkpoint is of another shape: {name} is {tuple(tensor.shape)}")
    if shapes:
        raise ValueError(f"the new checkpoint is of another shape: it has no {next(iter(shapes))}")
