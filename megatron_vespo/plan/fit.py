"""Whether trainer and engines fit their GPUs, and which layout would be chosen for the trainer's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from megatron_vespo.config.engine_flags import engine_ranks
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.policy.architecture import check_layout, num_experts
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.memory import ParameterCount, count_parameters, estimate_memory, kv_bytes_per_token

GIB = 1 << 30
USABLE = 0.85
"""Of a GPU's memory: the rest is CUDA's, NCCL's and fragmentation. Assumed, not measured."""
ENGINE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "fp8_kv": 2}
SIZES = (1, 2, 4, 8)


def fit(config: RunConfig, hf_config: Any, layout: ParallelLayout, gpu_gib: float) -> str:
    """Three lines for people: trainer, engine and the layout of the least communication that fits."""
    count = count_parameters(hf_config)
    usable = gpu_gib * GIB * USABLE
    asked = estimate_memory(hf_config, config, layout, count).total
    verdict = "fits" if asked <= usable else "does not fit"
    lines = [f"trainer      {asked / GIB:.1f} of {usable / GIB:.0f} usable GiB of {gpu_gib:g}: {verdict}"]
    lines.append(_engine(config, hf_config, count, usable, gpu_gib))
    chosen = next(
        (c for c in _by_communication(config, hf_config) if _total(config, hf_config, c, count) <= usable), None
    )
    if chosen is None:
        lines.append(f"would choose nothing: no layout of {layout.world_size} GPUs fits; add nodes")
    else:
        total = _total(config, hf_config, chosen, count) / GIB
        lines.append(
            f"would choose tensor {chosen.tensor}, pipeline {chosen.pipeline}, context {chosen.context}, "
            f"data {chosen.data}, expert {chosen.expert}: {total:.1f} GiB a rank"
        )
    return "\n".join(lines)


def _total(config: RunConfig, hf_config: Any, layout: ParallelLayout, count: ParameterCount) -> int:
    return estimate_memory(hf_config, config, layout, count).total


def _engine(config: RunConfig, hf_config: Any, count: ParameterCount, usable: float, gpu_gib: float) -> str:
    gpus = engine_ranks(config.rollout.engine_args)
    weights = (count.dense + count.experts) * ENGINE_BYTES[config.rollout.precision] // gpus
    a_token = kv_bytes_per_token(hf_config, gpus, 1 if config.rollout.precision == "fp8_kv" else 2)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    sequences = int(max(0.0, usable - weights) // (a_token * longest))
    verdict = "fits" if sequences else "does not fit"
    cache = f"KV cache {a_token * longest / GIB:.2f} GiB for {longest} tokens"
    return (
        f"engine/GPU   weights {weights / GIB:.1f} GiB, {cache}: "
        f"{sequences} such sequences at once; {verdict} {gpu_gib:g} GiB"
    )


def _by_communication(config: RunConfig, hf_config: Any) -> Iterator[ParallelLayout]:
    """Layouts that divide model and ranks; few pipeline stages first, then little tensor and context parallelism, and
    of those experts on few ranks."""
    world, experts = config.cluster.world_size, num_experts(hf_config)
    spread = [size for size in range(1, min(experts, world) + 1) if experts % size == 0] if experts else [1]
    options = sorted(
        itertools.product(SIZES, SIZES, SIZES, spread), key=lambda o: (o[0], o[1] * o[2], o[1], math.prod(o[3:]))
    )
    for pipeline, tensor, context, expert in options:
        try:
            layout = ParallelLayout(
                world_size=world,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                expert=expert,
                sequence=tensor > 1,
            )
            check_layout(hf_config, layout)
        except ValueError:
            continue
        yield layout
