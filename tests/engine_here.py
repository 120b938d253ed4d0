"""A reference engine in this process, so that a test can look at its weights, behind a real HTTP server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

from megatron_vespo.rollout.client import HttpEngine
from megatron_vespo.rollout.reference.generator import Generator
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.parameters import parameters_by_hf_name
from megatron_vespo.rollout.reference.server import build_app
from megatron_vespo.rollout.weight_routes import engine_weights
from megatron_vespo.weights.sync import EngineWeights


@dataclass
class EngineHere:
    generator: Generator
    engine: HttpEngine
    weights: EngineWeights

    def tensors(self) -> dict[str, torch.Tensor]:
        """HF name -> what it computes with."""
        return parameters_by_hf_name(self.generator.model.module)


@contextmanager
def engine_here(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[EngineHere]:
    generator = Generator(ReferenceModel(folder, dtype), 0, 64)
    generator.start()
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(build_app(generator, dtype, 0), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield EngineHere(generator, HttpEngine(url, control_timeout_s=30), engine_weights("reference", url, 30))
    finally:
        server.should_exit = True
        thread.join(10)
