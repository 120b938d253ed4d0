"""A running engine and the checkpoints it is switched between, for every test that asks an engine something."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rollout_checkpoints import plain_logprobs

from megatron_vespo.rollout import GenerateRequest, Generation, HttpEngine, SamplingParams

TOLERANCE = 2e-5
PROMPT = np.array([7, 3, 99, 140, 20, 61, 8], np.int32)


@dataclass
class Served:
    kind: str
    engine: HttpEngine
    folders: tuple[Path, Path]
    models: tuple[torch.nn.Module, torch.nn.Module]
    version: int = 0

    def load(self, index: int) -> int:
        self.version += 1
        self.engine.update_weights_from_disk(self.folders[index], self.version)
        return self.version

    def in_background(self, requests: list[GenerateRequest]) -> Future[list[list[Generation]]]:
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self.engine.generate, requests)
        pool.shutdown(wait=False)
        return future


def ask(name: str, max_tokens: int, *, n: int = 1, prompt: np.ndarray = PROMPT, **sampling: Any) -> GenerateRequest:
    seed = sampling.pop("seed", None)
    return GenerateRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **sampling), n=n, seed=seed)


def assert_own_logprobs(model: torch.nn.Module, prompt: np.ndarray, got: Generation, temperature: float = 1.0) -> None:
    expected = plain_logprobs(model, prompt, got.tokens, temperature)
    np.testing.assert_allclose(got.logprobs, expected, atol=TOLERANCE, rtol=0)


def assert_span(model: torch.nn.Module, prompt: np.ndarray, got: Generation, version: int) -> None:
    """The tokens that ``version`` sampled have the log-probs of ``model``, given everything before them."""
    span = got.weight_versions == version
    assert span.any()
    np.testing.assert_allclose(
        got.logprobs[span], plain_logprobs(model, prompt, got.tokens)[span], atol=TOLERANCE, rtol=0
    )
