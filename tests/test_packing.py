"""Micro-batch plans and packed rows."""

import numpy as np
import pytest
import torch

from megatron_vespo.samples.packing import pack, plan_micro_batches
from megatron_vespo.samples.records import Prompt, Sample


def sample(prompt: int, response: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(
        id=f"{seed}",
        prompt=Prompt(id=str(seed), tokens=rng.integers(1, 50, prompt).astype(np.int32), text="", answer=""),
        response_tokens=rng.integers(1, 50, response).astype(np.int32),
        rollout_logprobs=-rng.random(response).astype(np.float32),
        weight_versions=np.full(response, 3, np.int32),
        loss_mask=rng.random(response) < 0.8,
        finish_reason="stop",
        advantage=float(seed) + 1,
        old_logprobs=-rng.random(response).astype(np.float32),
    )


@pytest.mark.parametrize("ranks,multiple", [(1, 1), (2, 1), (3, 2), (4, 4)])
def test_plan_trains_each_sample_once_in_lockstep_within_budget(ranks, multiple):
    lengths = np.random.default_rng(0).integers(3, 60, 37).tolist()
    plan = plan_micro_batches(lengths, data_parallel=ranks, token_budget=100, multiple_of=multiple)
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(37))
    assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) % multiple == 0
    assert all(sum(lengths[i] for i in batch) <= 100 for rank in plan for batch in rank)
    loads = [sum(lengths[i] for batch in rank for i in batch) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths)


def test_plan_leaves_empty_micro_batches_when_there_are_too_few_samples():
    assert plan_micro_batches([5, 5], data_parallel=4, token_budget=100) == [[[0]], [[1]], [[]], [[]]]


def test_a_sequence_longer_than_the_budget_gets_a_micro_batch_of_its_own():
    plan = plan_micro_batches([500, 5], data_parallel=1, token_budget=100)
    assert sorted(map(sorted, plan[0])) == [[0], [1]]


@pytest.mark.parametrize("align", [1, 4])
def test_packed_index_speaks_of_the_next_token(align):
    samples = [sample(4, 5, 1), sample(3, 0, 2), sample(2, 7, 3)]
    batch = pack(samples, align=align)
    assert all(n % align == 0 for n in batch.cu_seqlens.diff().tolist())
    for i, s in enumerate(samples):
        start, first = int(batch.cu_seqlens[i]), len(s.prompt.tokens) - 1
        for t in range(len(s.response_tokens)):
            at = start + first + t
            assert batch.labels[at] == s.response_tokens[t] == batch.tokens[at + 1]
            assert batch.mask[at] == s.loss_mask[t] and batch.segment_ids[at] == i
            if s.loss_mask[t]:
                assert batch.rollout_logprobs[at] == s.rollout_logprobs[t]
                assert batch.old_logprobs[at] == s.old_logprobs[t] and batch.weight_versions[at] == 3
    assert batch.mask.sum() == sum(s.loss_mask.sum() for s in samples)
    assert batch.advantages.tolist() == [2.0, 3.0, 4.0]


def test_members_are_the_real_tokens_of_each_sequence():
    batch = pack([sample(4, 5, 1), sample(3, 0, 2)], align=4)
    assert batch.members().int().tolist() == [[1] * 9 + [0] * 7, [0] * 12 + [1] * 3 + [0]]
    assert batch.shard(torch.tensor([8, 9, 12])).members().int().tolist() == [[1, 0, 0], [0, 0, 1]]
    assert pack([], align=4).members().shape == (0, 4)


def test_an_empty_micro_batch_is_padding_only():
    batch = pack([], align=4)
    assert batch.num_segments == 0 and not batch.mask.any() and len(batch.tokens) == 4
    assert isinstance(batch.to(torch.device("cpu")).max_seqlen, int)
