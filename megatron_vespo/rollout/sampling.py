"""From prompts to samples: one request a prompt group, seeds counted from the run's own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vespo.rollout.jobs import Parts
from megatron_vespo.rollout.pool import EnginePool
from megatron_vespo.rollout.protocol import GenerateRequest, Generation, SamplingParams
from megatron_vespo.samples.records import Prompt, RoutingShape, Sample


def group_seeds(run_seed: int, step: int, batch: str, places: Iterable[int]) -> list[int]:
    """One seed a prompt group, from the group's place in its batch: a resumed run draws what the undisturbed one would
    have drawn, and batches of other names (training, evaluation) at the same step draw something else."""
    name = zlib.crc32(batch.encode())
    sequences = (np.random.SeedSequence([run_seed, step, name, place]) for place in places)
    return [int(sequence.generate_state(1)[0] & 0x7FFFFFFF) for sequence in sequences]


@dataclass(frozen=True, slots=True)
class GroupUnderWay:
    """The responses to one prompt that an engine has been asked for."""

    id: str
    done: Future[Any]
    samples: Callable[[], list[Sample]]
    """Once ``done`` is. Raises what kept them from coming."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Prompt groups to be asked for: ``size`` responses to each of ``prompts``."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    size: int
    batch: str
    """Names the rollout batch in the samples' ids."""
    seeds: Sequence[int]
    """One a prompt, see :func:`group_seeds`."""
    tokenizer: Any
    routing: RoutingShape | None = None
    """The model's, where the samples are to come with their routed experts."""

    def requests(self) -> list[GenerateRequest]:
        """One a prompt."""
        return [
            GenerateRequest(
                id=f"{self.batch}/{prompt.id}",
                prompt_tokens=prompt.tokens,
                sampling=self.sampling,
                n=self.size,
                seed=seed,
                routing=self.routing,
            )
            for prompt, seed in zip(self.prompts, self.seeds, strict=True)
        ]


def sample_groups(pool: EnginePool, groups: Groups) -> list[Sample]:
    """All responses, groups side by side in the order of the prompts."""
    requests = groups.requests()
    return [
        sample
        for prompt, request, found in zip(groups.prompts, requests, pool.generate(requests), strict=True)
        for sample in samples_of(request.id, prompt, found, groups.tokenizer)
    ]


def submit_groups(pool: EnginePool, groups: Groups, parts: Sequence[Parts | None] | None = None) -> list[GroupUnderWay]:
    """As :func:`sample_groups`, without waiting. ``parts``: of each prompt's responses, where there is something of
    them already (:func:`parts_of`)."""
    requests = groups.requests()

    def under_way(prompt: Prompt, request: GenerateRequest, done: Future[list[Generation]]) -> GroupUnderWay:
        return GroupUnderWay(request.id, done, lambda: samples_of(request.id, prompt, done.result(), groups.tokenizer))

    return [under_way(*each) for each in zip(groups.prompts, requests, pool.submit(requests, parts), strict=True)]


def parts_of(samples: Iterable[Sample], size: int) -> Parts:
    """What there is of a group's ``size`` responses, for :func:`submit_groups`."""
    parts: Parts = [None] * size
    for sample in samples:
        if len(sample.response_tokens):
            parts[sample.place] = Generation(
                sample.response_tokens,
                sample.rollout_logprobs,
                sample.weight_versions,
                sample.finish_reason,
                sample.routed_experts,
            )
    return parts


def samples_of(group: str, prompt: Prompt, generations: Sequence[Generation | None], tokenizer: Any) -> list[Sample]:
    """Of the group of that name; none for a response of which there is nothing."""
    return [
        Sample(
            id=f"{group}/{i}",
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
        for i, generation in enumerate(generations)
        if generation is not None
    ]
