"""Rollout engines: the protocol, our client of it, the small reference engine, SGLang, and a pool of them."""

from megatron_vespo.rollout.client import HttpEngine
from megatron_vespo.rollout.launch import launch_engine
from megatron_vespo.rollout.pool import EnginePool
from megatron_vespo.rollout.protocol import Engine, EngineError, GenerateRequest, Generation, SamplingParams

__all__ = [
    "Engine",
    "EngineError",
    "EnginePool",
    "GenerateRequest",
    "Generation",
    "HttpEngine",
    "SamplingParams",
    "launch_engine",
]
