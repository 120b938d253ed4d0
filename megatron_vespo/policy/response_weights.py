"""The sequence weights of samples, from the log-probs that they carry: after an update, or from stored rollouts.

Whole responses on the CPU: no collective, and neither the hot path's one all-reduce nor the device is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch

from megatron_vespo.objectives import ObjectiveInputs
from megatron_vespo.objectives.build import ComposedObjective
from megatron_vespo.objectives.coefficients import response_weights
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.weight_table import WeightTable, stacked

TOKENS_AT_ONCE = 1 << 17
"""Some twenty float64 vectors of this many tokens stay in a core's cache."""


def response_inputs(samples: Sequence[Sample], logprobs: Sequence[np.ndarray]) -> ObjectiveInputs:
    """What an objective sees of whole responses laid end to end, prompts left out.

    logprobs: log pi of each sample, [response] float. The denominators are 1: coefficients know none.
    """
    lengths = [len(s.response_tokens) for s in samples]

    def joined(parts: Sequence[np.ndarray], dtype: type = np.float32) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]))

    return ObjectiveInputs(
        logprobs=joined(logprobs),
        old_logprobs=joined([s.old_logprobs for s in samples if s.old_logprobs is not None]),
        rollout_logprobs=joined([s.rollout_logprobs for s in samples]),
        mask=joined([s.loss_mask for s in samples], bool),
        segment_ids=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        advantages=torch.tensor([s.advantage or 0.0 for s in samples], dtype=torch.float32),
        num_segments=len(samples),
        total_tokens=1.0,
        total_sequences=1.0,
    )


def weigh(objective: ComposedObjective, samples: Sequence[Sample], logprobs: Sequence[np.ndarray]) -> WeightTable:
    """The rows of ``samples`` (advantages and old_logprobs set) at the policy's ``logprobs``, in order.

    ``objective`` is prepared already where it searches its bounds.
    """
    tables = []
    for some in parts(samples):
        inputs = response_inputs(samples[some], logprobs[some])
        found = response_weights(objective, inputs)
        columns = {f.name: getattr(found, f.name).numpy() for f in fields(found)}
        tables.append(WeightTable(advantages=inputs.advantages.double().numpy(), **columns))
    return stacked(tables)


def weigh_trained(objective: ComposedObjective, samples: Sequence[Sample]) -> WeightTable:
    """The rows of the trained ones of ``samples``, as their updates saw them; an update's responses stay together.

    samples: whole mini-batches, with old_logprobs, train_logprobs and trained_version; objective: not prepared.
    """
    updates: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.trained_version is not None:
            updates.setdefault(sample.trained_version, []).append(sample)
    return stacked([_weigh_update(objective, members) for members in updates.values()])


def _weigh_update(objective: ComposedObjective, samples: Sequence[Sample]) -> WeightTable:
    logprobs = [s.train_logprobs for s in samples if s.train_logprobs is not None]
    if objective.needs_preparation:
        shares = [objective.measure(response_inputs(samples[some], logprobs[some])) for some in parts(samples)]
        objective = objective.prepare(torch.stack(shares).sum(0))
    return weigh(objective, samples, logprobs)


def parts(samples: Sequence[Sample]) -> Iterator[slice]:
    """Cuts between responses, so that a part has about TOKENS_AT_ONCE tokens (or one longer response)."""
    start = tokens = 0
    for end, sample in enumerate(samples):
        if end > start and tokens + len(sample.response_tokens) > TOKENS_AT_ONCE:
            yield slice(start, end)
            start, tokens = end, 0
        tokens += len(sample.response_tokens)
    if start < len(samples):
        yield slice(start, len(samples))
