"""From prompts to samples: one request a prompt group, seeds counted from the run's own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vespo.rollout.pool import EnginePool
from megatron_vespo.rollout.protocol import GenerateRequest, Generation, SamplingParams
from megatron_vespo.samples.records import Prompt, RoutingShape, Sample


def group_seeds(run_seed: int, step: int, batch: str, groups: int) -> list[int]:
    """One seed a prompt group, from the group's place: a resumed run draws what the undisturbed one would have drawn,
    and batches of other names (training, evaluation) at the same step draw something else."""
    name = zlib.crc32(batch.encode())
    sequences = (np.random.SeedSequence([run_seed, step, name, place]) for place in range(groups))
    return [int(sequence.generate_state(1)[0] & 0x7FFFFFFF) for sequence in sequences]


def sample_groups(
    pool: EnginePool,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    samples_per_prompt: int,
    batch: str,
    seeds: Sequence[int],
    tokenizer: Any,
    routing: RoutingShape | None = None,
) -> list[Sample]:
    """``samples_per_prompt`` responses to each prompt, groups side by side in the order of ``prompts``.

    batch: names the rollout batch in the samples' ids. seeds: one a prompt, see :func:`group_seeds`. routing: the
    model's, where the samples are to come with their routed experts.
    """
    requests = [
        GenerateRequest(
            id=f"{batch}/{prompt.id}",
            prompt_tokens=prompt.tokens,
            sampling=sampling,
            n=samples_per_prompt,
            seed=seed,
            routing=routing,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    groups = pool.generate(requests)
    return [
        _sample(f"{request.id}/{i}", prompt, generation, tokenizer)
        for prompt, request, group in zip(prompts, requests, groups, strict=True)
        for i, generation in enumerate(group)
    ]


def _sample(name: str, prompt: Prompt, generation: Generation, tokenizer: Any) -> Sample:
    return Sample(
        id=name,
        prompt=prompt,
        response_tokens=generation.tokens,
        rollout_logprobs=generation.logprobs,
        weight_versions=generation.weight_versions,
        loss_mask=np.ones(len(generation.tokens), bool),
        finish_reason=generation.finish_reason,
        text=tokenizer.decode(generation.tokens, skip_special_tokens=True),
        routed_experts=generation.routed_experts,
        metadata={"rollout_retries": list(generation.retries)} if generation.retries else {},
    )
