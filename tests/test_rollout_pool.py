"""The pool's sharing of work, over engines that only count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.rollout import EngineError, EnginePool, GenerateRequest, Generation, SamplingParams


class CountingEngine:
    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[GenerateRequest] = []
        self.version = 0
        self.error: EngineError | None = None

    def generate(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        if self.error:
            raise self.error
        self.asked += requests
        tokens = [np.array([int(request.id)], np.int32) for request in requests]
        return [[Generation(t, np.zeros(1, np.float32), np.zeros(1, np.int32), "length")] for t in tokens]

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        self.version = version

    def weight_version(self) -> int:
        return self.version


def requests(costs: list[int]) -> list[GenerateRequest]:
    return [
        GenerateRequest(str(i), np.array([1], np.int32), SamplingParams(max_tokens=cost))
        for i, cost in enumerate(costs)
    ]


def pool(count: int = 3) -> tuple[EnginePool, list[CountingEngine]]:
    engines = [CountingEngine(f"http://engine-{i}") for i in range(count)]
    return EnginePool(engines), engines  # type: ignore[arg-type]


def test_work_is_spread_by_tokens_and_answers_keep_their_order() -> None:
    shared, engines = pool()
    costs = [900, 100, 100, 100, 100, 500]
    answers = shared.generate(requests(costs))
    assert [int(group[0].tokens[0]) for group in answers] == list(range(6))
    loads = [sum(request.sampling.max_tokens for request in engine.asked) for engine in engines]
    assert sorted(loads) == [200, 700, 900]
    assert shared._load == [0, 0, 0]


def test_a_failing_engine_fails_the_call_by_name_and_frees_its_load() -> None:
    shared, engines = pool()
    engines[1].error = EngineError("http://engine-1 is dead")
    with pytest.raises(EngineError, match="engine-1 is dead"):
        shared.generate(requests([10] * 6))
    assert shared._load == [0, 0, 0]


def test_an_update_reaches_every_engine_and_a_stray_version_is_reported() -> None:
    shared, engines = pool()
    shared.update_weights_from_disk(Path("/weights"), 4)
    assert [engine.version for engine in engines] == [4, 4, 4] and shared.weight_version() == 4
    engines[2].version = 3
    with pytest.raises(EngineError, match=r"engine-2': 3"):
        shared.weight_version()
