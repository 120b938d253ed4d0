"""An engine seen over HTTP: SGLang's native API, which the reference engine speaks too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from megatron_vespo.rollout import io_loop
from megatron_vespo.rollout.process import EngineProcess
from megatron_vespo.rollout.protocol import (
    ALL_MEMORY,
    EngineDown,
    EngineError,
    GenerateRequest,
    Generation,
    MemoryPart,
    PauseMode,
    SamplingParams,
)
from megatron_vespo.rollout.routing import decode_routing

CONNECT_ATTEMPTS = 3
CONNECT_RETRY_S = 0.3
CONNECT_TIMEOUT_S = 10.0
CALL_TOKENS = 65_536
"""Response tokens that one HTTP call may ask for, unless a single group wants more."""
# A connection a call: one kept alive may be closed by the server in the moment that it is used again, and that would
# look like an engine's death. No bound on their number: every group must be at the engine for it to batch them.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)

T = TypeVar("T")


class HttpEngine:
    """One engine. Thread-safe: another thread may pause or abort while one waits for an answer.

    Short prompt groups share an HTTP call, long ones have their own: a call that reaches the engine whole is batched
    the same way each time, which makes a small run repeatable to the bit. Only refused connections are tried again
    here: such a call never reached the engine, so that no sample is drawn twice.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        process: EngineProcess | None = None,
        request_timeout_s: float = 1800.0,
        control_timeout_s: float = 600.0,
    ) -> None:
        """``key``: what the engine wants as a bearer token. ``process`` is set where we launched the engine;
        ``shutdown`` ends it then. ``request_timeout_s`` bounds ``generate`` and ``score``; ``answer`` has no bound."""
        self.url = url.rstrip("/")
        self._process = process
        self._request_timeout_s = request_timeout_s
        # trust_env off: a proxy of the environment must not see loopback traffic.
        options: dict[str, Any] = {
            "base_url": self.url,
            "trust_env": False,
            "limits": LIMITS,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
        }
        self._control = httpx.Client(timeout=httpx.Timeout(control_timeout_s, connect=CONNECT_TIMEOUT_S), **options)
        self._calls = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S), **options)
        self._paused: PauseMode | None = None
        self._held = ALL_MEMORY
        self._running: dict[str, int] = {}
        self._scores = count()
        self._lock = threading.Lock()

    # --- sampling -----------------------------------------------------------------------------------------------

    async def answer(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        body = _generate_body(requests)
        with self._lock:
            self._running.update({request.id: request.n for request in requests})
        try:
            items = iter(await self._post(_name(requests), body))
        finally:
            with self._lock:
                for request in requests:
                    self._running.pop(request.id, None)
        return [[_generation(self.url, request, item) for item in islice(items, request.n)] for request in requests]

    def generate(self, requests: list[GenerateRequest], timeout_s: float | None = None) -> list[list[Generation]]:
        """:meth:`answer` from a thread, in as many calls as CALL_TOKENS asks for."""

        async def ask() -> list[list[Generation]]:
            calls = [self.answer(call) for call in calls_of(requests, lambda request: request)]
            return list(chain.from_iterable(await asyncio.gather(*calls)))

        return io_loop.wait_for(self._in_time(ask(), f"/generate of {_name(requests)}", timeout_s))

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        name = f"score-{next(self._scores)}"
        body = {
            "input_ids": [sequence.tolist() for sequence in sequences],
            "sampling_params": [{"max_new_tokens": 0, "temperature": 1.0}] * len(sequences),
            "rid": [_rid(name, i) for i in range(len(sequences))],
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = io_loop.wait_for(self._in_time(self._post(name, body), f"/generate of {name!r}"))
        # The first token has no prefix, and no log-prob.
        return [
            np.array([entry[0] for entry in item["meta_info"]["input_token_logprobs"][1:]], np.float32)
            for item in answer
        ]

    async def _in_time(self, answer: Coroutine[Any, Any, T], asked: str, timeout_s: float | None = None) -> T:
        try:
            return await asyncio.wait_for(answer, timeout_s or self._request_timeout_s)
        except TimeoutError:
            raise self._late(asked, "no answer") from None

    async def _post(self, name: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        asked = f"/generate of {name}"
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            try:
                response = await self._calls.post("/generate", json=body)
                if response.status_code >= 500 and not await asyncio.to_thread(self.healthy):
                    raise EngineDown(self._refusal(response, asked))
                return self._checked(response, asked).json()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if attempt == CONNECT_ATTEMPTS or not self._process_runs():
                    raise self._unreachable(asked, error) from error
                await asyncio.sleep(CONNECT_RETRY_S * attempt)
            except httpx.TransportError as error:
                raise self._unreachable(asked, error) from error
        raise AssertionError("unreachable")

    # --- control ------------------------------------------------------------------------------------------------

    async def ping(self) -> None:
        # SGLang asks its scheduler for this, the reference engine the thread that decodes.
        try:
            response = await self._calls.get("/server_info")
            if response.status_code != 200:
                raise EngineDown(self._refusal(response, "/server_info"))
        except httpx.TransportError as error:
            raise self._unreachable("/server_info", error) from error

    def pause(self, mode: PauseMode = "retract") -> None:
        self._call("POST", "/pause_generation", {"mode": mode})
        self._paused = mode

    def resume(self) -> None:
        self._call("POST", "/continue_generation", {})
        self._paused = None

    @property
    def paused(self) -> PauseMode | None:
        """How it was paused from here; None: it was not."""
        return self._paused

    def hold(self, parts: frozenset[MemoryPart]) -> None:
        # SGLang dies of being asked to give up or take back a part twice.
        if given_up := sorted(self._held - parts):
            self._call("POST", "/release_memory_occupation", {"tags": given_up})
            self._held &= parts
        if taken_back := sorted(parts - self._held):
            self._call("POST", "/resume_memory_occupation", {"tags": taken_back})
            self._held = parts

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        # Paused in place, requests keep the old weights' keys: SGLang could not flush them, and would die trying.
        body = {
            "model_path": str(folder),
            "weight_version": str(version),
            "flush_cache": self._paused != "in_place",
        }
        self._call("POST", "/update_weights_from_disk", body)

    def weight_version(self) -> int:
        version = self._call("GET", "/model_info").json()["weight_version"]
        return _version(self.url, version)

    def returns_routing(self) -> bool:
        """Whether it was launched so that it can answer requests with ``routing``."""
        return bool(self._call("GET", "/server_info").json().get("enable_return_routed_experts"))

    def abort(self, request_id: str | None = None) -> None:
        if request_id is None:
            self._call("POST", "/abort_request", {"abort_all": True})
            return
        with self._lock:
            n = self._running.get(request_id, 0)
        for i in range(n):
            self._call("POST", "/abort_request", {"rid": _rid(request_id, i)})

    def healthy(self) -> bool:
        if not self._process_runs():
            return False
        try:
            return self._control.get("/health", timeout=CONNECT_TIMEOUT_S).status_code == 200
        except httpx.TransportError:
            return False

    def shutdown(self) -> None:
        io_loop.wait_for(self._calls.aclose())
        self._control.close()
        if self._process is not None:
            self._process.shutdown()

    def __enter__(self) -> HttpEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def control(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, asked: str | None = None
    ) -> dict[str, Any]:
        """The JSON answer of a control route. ``asked`` names the call in an error, where the body is long."""
        return self._call(method, path, body, asked).json()

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, asked: str | None = None
    ) -> httpx.Response:
        asked = asked or f"{path} {body or ''}".rstrip()
        try:
            return self._checked(self._control.request(method, path, json=body), asked)
        except httpx.TransportError as error:
            raise self._unreachable(asked, error) from error

    # --- errors -------------------------------------------------------------------------------------------------

    def _process_runs(self) -> bool:
        return self._process is None or self._process.exit_code() is None

    def _checked(self, response: httpx.Response, asked: str) -> httpx.Response:
        if response.status_code != 200:
            raise EngineError(self._refusal(response, asked))
        return response

    def _refusal(self, response: httpx.Response, asked: str) -> str:
        mend = ""
        if response.status_code in (401, 403):
            mend = "; it wants a key: name the environment variable that holds it in rollout.urls_key_env"
        return f"{self.url} refused {asked}: HTTP {response.status_code} {response.text[:2000]}{mend}"

    def _unreachable(self, asked: str, error: httpx.TransportError) -> EngineError:
        if not self._process_runs():
            assert self._process is not None
            return EngineDown(f"{self.url} is dead, asked for {asked}: {self._process.exit_report()}")
        if isinstance(error, httpx.TimeoutException):
            return self._late(asked, f"no answer ({type(error).__name__})")
        return EngineDown(f"{self.url} is unreachable, asked for {asked}: {error!r}; start it, or correct rollout.urls")

    def _late(self, asked: str, what: str) -> EngineError:
        return EngineDown(
            f"{self.url} gave {what} to {asked} in time; it hangs or is overloaded: "
            "look at its log, or raise rollout.request_timeout_s"
        )


def _rid(request_id: str, index: int) -> str:
    # SGLang's scheduler aborts by prefix: the closing mark keeps "a#1" from meaning "a#10" too.
    return f"{request_id}#{index};"


def calls_of(items: Sequence[T], request_of: Callable[[T], GenerateRequest]) -> list[list[T]]:
    """Consecutive items that all want their routing or none, as many to a call as CALL_TOKENS allows."""
    calls: list[list[T]] = []
    room = 0
    for item in items:
        request = request_of(item)
        wanted = request.n * request.sampling.max_tokens
        if not calls or wanted > room or (request.routing is None) != (request_of(calls[-1][-1]).routing is None):
            calls.append([])
            room = CALL_TOKENS
        calls[-1].append(item)
        room -= wanted
    return calls


def _name(call: list[GenerateRequest]) -> str:
    others = f" and {len(call) - 1} more" if len(call) > 1 else ""
    return f"request {call[0].id!r}{others}"


def _generate_body(requests: list[GenerateRequest]) -> dict[str, Any]:
    samples = [(request, i) for request in requests for i in range(request.n)]
    body = {
        "input_ids": [request.prompt_tokens.tolist() for request, _ in samples],
        "sampling_params": [
            _sampling_body(request.sampling) | ({} if request.seed is None else {"sampling_seed": request.seed + i})
            for request, i in samples
        ],
        "rid": [_rid(request.id, i) for request, i in samples],
        "return_logprob": True,
    }
    return body if requests[0].routing is None else body | {"return_routed_experts": True}


def _sampling_body(sampling: SamplingParams) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    else:
        body["ignore_eos"] = True
    return body


def _generation(url: str, request: GenerateRequest, item: dict[str, Any]) -> Generation:
    meta = item["meta_info"]
    entries = meta["output_token_logprobs"]
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length", "abort"):
        raise EngineError(f"{url} ended request {request.id!r} with unknown finish_reason {meta['finish_reason']}")
    return Generation(
        tokens=np.array([entry[1] for entry in entries], np.int32),
        logprobs=np.array([entry[0] for entry in entries], np.float32),
        weight_versions=_versions(url, meta, len(entries)),
        finish_reason=reason,
        routed_experts=_routed_experts(url, request, meta, len(entries)),
    )


def _routed_experts(url: str, request: GenerateRequest, meta: dict[str, Any], length: int) -> np.ndarray | None:
    if request.routing is None:
        return None
    packed = meta.get("routed_experts")
    if packed is None:
        if not length:  # aborted before it began
            return None
        raise EngineError(
            f"{url} answered request {request.id!r} without its routed experts; launch it with "
            "--enable-return-routed-experts, or set model.routing_replay to r2 or none"
        )
    try:
        return decode_routing(packed, len(request.prompt_tokens) + length - 1, request.routing)
    except ValueError as error:
        raise EngineError(f"{url} sent unusable routed experts for request {request.id!r}: {error}") from None


def _versions(url: str, meta: dict[str, Any], length: int) -> np.ndarray:
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": length}]
    versions = np.array(
        list(chain.from_iterable([_version(url, span["version"])] * (span["end"] - span["start"]) for span in spans)),
        np.int32,
    )
    if len(versions) != length:
        raise EngineError(f"{url} sent weight_versions {spans} for a response of {length} tokens")
    return versions


def _version(url: str, version: str) -> int:
    if not version.isdecimal():
        raise EngineError(
            f"{url} serves weight version {version!r}, not a count of updates; launch it with --weight-version 0"
        )
    return int(version)
