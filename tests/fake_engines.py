"""Engines that only count: token t of a response is its place in prompt + response, sampled in no time or slowly."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_vespo.rollout import EngineDown, EngineError, GenerateRequest, Generation, PauseMode, SamplingParams
from megatron_vespo.rollout.restart import ServedWeights


class FakeEngine:
    """``tokens_per_s``: of each response, all side by side; None: at once."""

    def __init__(self, url: str, tokens_per_s: float | None = None, version: int = 0) -> None:
        self.url, self.tokens_per_s, self.version = url, tokens_per_s, version
        self.asked: list[GenerateRequest] = []
        self.calls: list[list[str]] = []
        self.error: Exception | None = None
        self.hangs = False
        self.deaf = False
        """Does not end what is aborted."""
        self.paused: PauseMode | None = None
        self.aborted: set[str] = set()
        self.shut_down = 0

    async def answer(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        self._check()
        self.asked += requests
        self.calls.append([request.id for request in requests])
        return await asyncio.gather(*(self._sampled(request) for request in requests))

    async def _sampled(self, request: GenerateRequest) -> list[Generation]:
        length, started = request.sampling.max_tokens, time.monotonic()
        reason = "length"
        while self.hangs or (self.tokens_per_s and time.monotonic() - started < length / self.tokens_per_s):
            before = time.monotonic()
            await asyncio.sleep(0.005)
            self._check()
            if self.paused:
                started += time.monotonic() - before
            if request.id in self.aborted and not self.deaf and not self.hangs:
                length = min(length, int((time.monotonic() - started) * (self.tokens_per_s or 1e9)))
                reason = "abort"
                break
        places = np.arange(len(request.prompt_tokens), len(request.prompt_tokens) + length, dtype=np.int32)
        versions = np.full(length, self.version, np.int32)
        return [Generation(places, -places.astype(np.float32), versions, reason) for _ in range(request.n)]  # type: ignore[arg-type]

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    async def ping(self) -> None:
        self._check()
        while self.hangs:
            await asyncio.sleep(0.005)

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        self._check()
        return [np.full(len(sequence) - 1, float(self.version), np.float32) for sequence in sequences]

    def pause(self, mode: PauseMode = "retract") -> None:
        self._check()
        self.paused = mode

    def resume(self) -> None:
        self._check()
        self.paused = None

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        self._check()
        self.version = version

    def weight_version(self) -> int:
        self._check()
        return self.version

    def abort(self, request_id: str | None = None) -> None:
        self._check()
        self.aborted |= {request.id for request in self.asked} if request_id is None else {request_id}

    def healthy(self) -> bool:
        return self.error is None

    def shutdown(self) -> None:
        self.shut_down += 1

    def die(self) -> None:
        self.error = EngineDown(f"{self.url} is dead")


class FakeLauncher:
    """Starts another FakeEngine, unless ``fails`` says otherwise."""

    def __init__(self, **engine: float) -> None:
        self.engine = engine
        self.launched: list[tuple[int, ServedWeights, FakeEngine]] = []
        self.fails: Callable[[int], str | None] = lambda attempt: None
        self.seconds = 0.0
        self.lies = 0
        self.began = threading.Event()

    def relaunch(self, index: int, weights: ServedWeights) -> FakeEngine:
        self.began.set()
        time.sleep(self.seconds)
        engine = FakeEngine(f"http://again-{index}", version=weights.version + self.lies, **self.engine)
        self.launched.append((index, weights, engine))
        failure = self.fails(len(self.launched))
        if failure is not None:
            raise EngineError(failure)
        return engine

    def post_mortem(self, index: int) -> str:
        return f"the end of engine-{index}.log"


def request(name: str, tokens: int = 10, *, n: int = 1, prompt: int = 1, seed: int | None = None) -> GenerateRequest:
    return GenerateRequest(name, np.arange(prompt, dtype=np.int32), SamplingParams(max_tokens=tokens), n=n, seed=seed)
