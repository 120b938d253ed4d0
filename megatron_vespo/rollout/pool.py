"""Several engines that look like one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_vespo.rollout.protocol import Engine, EngineError, GenerateRequest, Generation


class EnginePool:
    """Requests go to the engine with the fewest unfinished response tokens; weights and pauses go to all of them.

    Raises EngineError, which names the engine, as soon as one of them fails: an engine that missed an update or a
    request must not be used on quietly.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("EnginePool needs at least one engine; set rollout.engines or rollout.urls")
        self.engines = tuple(engines)
        self.url = ", ".join(engine.url for engine in engines)
        self._load = [0] * len(engines)
        self._lock = threading.Lock()

    def generate(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        shares = self._assign([request.n * request.sampling.max_tokens for request in requests])
        answers: dict[int, list[Generation]] = {}

        def ask(index: int) -> None:
            share = shares[index]
            try:
                got = self.engines[index].generate([requests[i] for i in share])
                answers.update(zip(share, got, strict=True))
            finally:
                with self._lock:
                    self._load[index] -= sum(requests[i].n * requests[i].sampling.max_tokens for i in share)

        self._each(ask, [index for index, share in enumerate(shares) if share])
        return [answers[i] for i in range(len(requests))]

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Scored by the first engine; each engine's own weights are probed through ``engines``."""
        return self.engines[0].score(sequences)

    def pause(self) -> None:
        self._each(lambda index: self.engines[index].pause())

    def resume(self) -> None:
        self._each(lambda index: self.engines[index].resume())

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        self._each(lambda index: self.engines[index].update_weights_from_disk(folder, version))

    def weight_version(self) -> int:
        """The version all engines serve. Raises EngineError where they differ."""
        versions = {engine.url: engine.weight_version() for engine in self.engines}
        if len(set(versions.values())) > 1:
            raise EngineError(f"the engines serve different weight versions: {versions}; update all of them again")
        return next(iter(versions.values()))

    def abort(self, request_id: str | None = None) -> None:
        self._each(lambda index: self.engines[index].abort(request_id))

    def healthy(self) -> bool:
        return all(engine.healthy() for engine in self.engines)

    def shutdown(self) -> None:
        self._each(lambda index: self.engines[index].shutdown())

    def _assign(self, costs: list[int]) -> list[list[int]]:
        """Which requests each engine gets; adds their cost to its load."""
        shares: list[list[int]] = [[] for _ in self.engines]
        with self._lock:
            for i, cost in enumerate(costs):
                index = min(range(len(self.engines)), key=self._load.__getitem__)
                shares[index].append(i)
                self._load[index] += cost
        return shares

    def _each(self, ask: Callable[[int], None], indices: list[int] | None = None) -> None:
        chosen = list(range(len(self.engines))) if indices is None else indices
        if len(chosen) == 1:
            ask(chosen[0])
            return
        with ThreadPoolExecutor(max(1, len(chosen))) as threads:
            for done in [threads.submit(ask, index) for index in chosen]:
                done.result()
