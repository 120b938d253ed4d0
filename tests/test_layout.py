"""Parallel layouts: how auto resolves, what is refused, and which tokens a context-parallel rank holds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from megatron_vespo import platform
from megatron_vespo.config.schema import ParallelConfig
from megatron_vespo.policy import ranks
from megatron_vespo.policy.layout import ParallelLayout, local_indices


@pytest.mark.parametrize(
    ("parallel", "world_size", "experts", "expert"),
    [
        ({}, 2, 8, 2),
        ({"tensor": 2}, 2, 8, 2),
        ({"pipeline": 2}, 2, 8, 1),
        ({"context": 2}, 2, 8, 2),
        ({"tensor": 2, "expert_tensor": 2}, 2, 8, 1),
        ({"tensor": 4}, 32, 128, 32),
        ({}, 4, 6, 2),
        ({}, 2, 0, 1),
        ({"tensor": 2, "expert": 1}, 2, 8, 1),
    ],
)
def test_expert_auto_is_the_largest_size_that_divides(
    parallel: dict[str, int], world_size: int, experts: int, expert: int
) -> None:
    assert ParallelLayout.from_config(ParallelConfig(**parallel), world_size, experts).expert == expert


def test_an_moe_under_tensor_parallelism_gets_sequence_parallelism() -> None:
    assert ParallelLayout.from_config(ParallelConfig(tensor=2), 2, 8).sequence
    assert not ParallelLayout.from_config(ParallelConfig(tensor=2), 2, 0).sequence
    assert not ParallelLayout.from_config(ParallelConfig(sequence=True), 2, 8).sequence


@pytest.mark.parametrize(
    ("parallel", "world_size", "experts", "message"),
    [
        ({"tensor": 3}, 4, 0, r"parallel\.tensor .* = 3 x 1 x 1 = 3 does not divide the 4 ranks"),
        ({"expert": 4}, 2, 8, r"parallel\.expert .* = 4 x 1 x 1 = 4 does not divide the 2 ranks"),
        ({"expert": 2}, 2, 0, r"parallel\.expert = 2, but the model has no experts"),
        ({"virtual_pipeline": 2}, 2, 0, r"parallel\.virtual_pipeline = 2 needs parallel\.pipeline"),
    ],
)
def test_a_layout_that_does_not_divide_the_ranks_is_refused(
    parallel: dict[str, int], world_size: int, experts: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelLayout.from_config(ParallelConfig(**parallel), world_size, experts)


def test_zigzag_cuts_every_sequence_by_itself() -> None:
    cu_seqlens = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert local_indices(cu_seqlens, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert local_indices(cu_seqlens, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]
    assert local_indices(cu_seqlens, 1, 0).tolist() == list(range(12))


def test_zigzag_of_many_sequences_covers_every_token_once() -> None:
    lengths = torch.randint(1, 9, (50,), generator=torch.Generator().manual_seed(0)) * 8
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    shards = [local_indices(cu_seqlens, 4, r) for r in range(4)]
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(int(cu_seqlens[-1])))
    positions = shards[3] - cu_seqlens[torch.searchsorted(cu_seqlens, shards[3], right=True) - 1]
    length = lengths[torch.searchsorted(cu_seqlens, shards[3], right=True) - 1]
    assert ((positions >= length * 3 // 8) & (positions < length * 5 // 8)).all()  # rank 3 of 4: the middle two chunks


def test_a_sequence_that_is_not_padded_for_context_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 of the packed row has 6 tokens.*multiple of 4"):
        local_indices(torch.tensor([0, 4, 10]), 2, 0)


def layouts_one_after_another() -> tuple[list[tuple[int, int, bool]], int]:
    import threading

    platform.current().prepare_megatron(1)
    seen = []
    threads_before = len(list(_threads()))
    for sizes in ({"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}) * 3:
        ranks.initialize(ParallelLayout.from_config(ParallelConfig(**sizes), 2), seed=1)
        seen.append((ranks.dp_rank(), ranks.cp_rank(), ranks.is_last_stage()))
        assert (ranks.cp_group() is not None) == ("context" in sizes)
        ranks.destroy()
    assert threading.active_count() == 1
    return seen[:4], len(list(_threads())) - threads_before


def _threads() -> list[str]:
    import os

    return os.listdir("/proc/self/task")


@pytest.mark.slow
def test_layouts_follow_each_other_in_one_process_without_leaking_threads() -> None:
    (first, grown), (second, _) = run_ranks(layouts_one_after_another, 2)
    assert first == [(0, 0, True), (0, 0, False), (0, 0, True), (0, 0, True)]
    assert second == [(0, 0, True), (0, 0, True), (0, 1, True), (1, 0, True)]
    assert grown < 20, f"12 layouts left {grown} threads behind"


def one_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the bug")
    dist.barrier()


@pytest.mark.slow
def test_a_failing_rank_ends_the_others_and_shows_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 ---(.|\n)*one_rank_fails(.|\n)*KeyError: 'the bug'"):
        run_ranks(one_rank_fails, 2, timeout_s=60)
