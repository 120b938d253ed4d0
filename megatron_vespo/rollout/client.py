"""An engine seen over HTTP: SGLang's native API, which the reference engine speaks too."""

from __future__ import annotations

import asyncio
import threading
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from megatron_vespo.rollout.process import EngineProcess
from megatron_vespo.rollout.protocol import EngineError, GenerateRequest, Generation, SamplingParams
from megatron_vespo.rollout.routing import decode_routing

CONNECT_ATTEMPTS = 3
CONNECT_RETRY_S = 0.3
CONNECT_TIMEOUT_S = 10.0
CALL_TOKENS = 65_536
"""Response tokens that one HTTP call may ask for, unless a single group wants more."""


class HttpEngine:
    """One engine. Thread-safe: another thread may pause or abort while ``generate`` waits.

    Short prompt groups share an HTTP call, long ones have their own: a call that reaches the engine whole is batched
    the same way each time, which makes a small run repeatable to the bit. Only refused connections are tried again:
    such a call never reached the engine, so that no sample is drawn twice.
    """

    def __init__(
        self,
        url: str,
        *,
        process: EngineProcess | None = None,
        request_timeout_s: float = 600.0,
        control_timeout_s: float = 600.0,
    ) -> None:
        """``process`` is set where we launched the engine; ``shutdown`` ends it then."""
        self.url = url.rstrip("/")
        self._process = process
        self._request_timeout_s = request_timeout_s
        # trust_env off: a proxy of the environment must not see loopback traffic.
        self._control = httpx.Client(
            base_url=self.url, trust_env=False, timeout=httpx.Timeout(control_timeout_s, connect=CONNECT_TIMEOUT_S)
        )
        self._running: dict[str, int] = {}
        self._scores = count()
        self._lock = threading.Lock()

    # --- sampling -----------------------------------------------------------------------------------------------

    def generate(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        calls = _calls(requests)
        bodies = [(_name(call), _generate_body(call)) for call in calls]
        with self._lock:
            self._running.update({request.id: request.n for request in requests})
        try:
            answers = asyncio.run(self._post_all(bodies))
        finally:
            with self._lock:
                for request in requests:
                    self._running.pop(request.id, None)
        items = chain.from_iterable(answers)
        return [[_generation(self.url, request, item) for item in islice(items, request.n)] for request in requests]

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        name = f"score-{next(self._scores)}"
        body = {
            "input_ids": [sequence.tolist() for sequence in sequences],
            "sampling_params": [{"max_new_tokens": 0, "temperature": 1.0}] * len(sequences),
            "rid": [_rid(name, i) for i in range(len(sequences))],
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        (answer,) = asyncio.run(self._post_all([(name, body)]))
        # The first token has no prefix, and no log-prob.
        return [
            np.array([entry[0] for entry in item["meta_info"]["input_token_logprobs"][1:]], np.float32)
            for item in answer
        ]

    async def _post_all(self, bodies: list[tuple[str, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        timeout = httpx.Timeout(self._request_timeout_s, connect=CONNECT_TIMEOUT_S)
        # No limit: every group must be at the engine for it to batch them.
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=timeout, limits=limits) as client:
            return await asyncio.gather(*(self._post(client, name, body) for name, body in bodies))

    async def _post(self, client: httpx.AsyncClient, name: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        asked = f"/generate of {name}"
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            try:
                return self._checked(await client.post("/generate", json=body), asked).json()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if attempt == CONNECT_ATTEMPTS or not self._process_runs():
                    raise self._unreachable(asked, error) from error
                await asyncio.sleep(CONNECT_RETRY_S * attempt)
            except httpx.TransportError as error:
                raise self._unreachable(asked, error) from error
        raise AssertionError("unreachable")

    # --- control ------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        # retract: with mode in_place later tokens would be computed from the old weights' keys and match neither model.
        self._call("POST", "/pause_generation", {"mode": "retract"})

    def resume(self) -> None:
        self._call("POST", "/continue_generation", {})

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
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
        self._control.close()
        if self._process is not None:
            self._process.shutdown()

    def __enter__(self) -> HttpEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        asked = f"{path} {body or ''}".rstrip()
        try:
            return self._checked(self._control.request(method, path, json=body), asked)
        except httpx.TransportError as error:
            raise self._unreachable(asked, error) from error

    # --- errors -------------------------------------------------------------------------------------------------

    def _process_runs(self) -> bool:
        return self._process is None or self._process.exit_code() is None

    def _checked(self, response: httpx.Response, asked: str) -> httpx.Response:
        if response.status_code != 200:
            raise EngineError(f"{self.url} refused {asked}: HTTP {response.status_code} {response.text[:2000]}")
        return response

    def _unreachable(self, asked: str, error: httpx.TransportError) -> EngineError:
        if not self._process_runs():
            assert self._process is not None
            return EngineError(f"{self.url} is dead, asked for {asked}: {self._process.exit_report()}")
        if isinstance(error, httpx.TimeoutException):
            return EngineError(
                f"{self.url} gave no answer to {asked} in time ({type(error).__name__}); it hangs or is overloaded: "
                "look at its log, or raise rollout.request_timeout_s"
            )
        return EngineError(
            f"{self.url} is unreachable, asked for {asked}: {error!r}; start it, or correct rollout.urls"
        )


def _rid(request_id: str, index: int) -> str:
    # SGLang's scheduler aborts by prefix: the closing mark keeps "a#1" from meaning "a#10" too.
    return f"{request_id}#{index};"


def _calls(requests: list[GenerateRequest]) -> list[list[GenerateRequest]]:
    """Consecutive requests that all want their routing or none, as many to a call as CALL_TOKENS allows."""
    calls: list[list[GenerateRequest]] = []
    room = 0
    for request in requests:
        wanted = request.n * request.sampling.max_tokens
        if not calls or wanted > room or (request.routing is None) != (calls[-1][-1].routing is None):
            calls.append([])
            room = CALL_TOKENS
        calls[-1].append(request)
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
