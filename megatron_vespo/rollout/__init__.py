"""Rollout engines: the protocol, our client of it, the small reference engine, SGLang, and a pool of them."""

from megatron_vespo.rollout.client import HttpEngine
from megatron_vespo.rollout.dispatch import Patience
from megatron_vespo.rollout.launch import launch_engine
from megatron_vespo.rollout.pool import EnginePool
from megatron_vespo.rollout.protocol import (
    Engine,
    EngineDown,
    EngineError,
    GenerateRequest,
    Generation,
    PauseMode,
    SamplingParams,
)
from megatron_vespo.rollout.restart import ServedWeights

__all__ = [
    "Engine",
    "EngineDown",
    "EngineError",
    "EnginePool",
    "GenerateRequest",
    "Generation",
    "HttpEngine",
    "Patience",
    "PauseMode",
    "SamplingParams",
    "ServedWeights",
    "launch_engine",
]
