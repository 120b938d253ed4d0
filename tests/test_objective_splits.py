"""Loss, gradient and metrics do not depend on how a mini-batch is split: micro-batches, packing order, DP and CP."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from objective_data import (
    AGGREGATION_PARAMS,
    CORRECTION_CASES,
    OBJECTIVE_CASES,
    build_case,
    make_responses,
    merged_sums,
    pack,
)
from ranks import run_ranks

from megatron_vespo.observe.metrics import MetricSums, merged

Case = tuple[str, str, str]
# Every objective with every aggregation, and every objective with every correction (aggregations take turns); the
# whole product, in micro-batches, is in test_objective_reference.py.
CASES: list[Case] = [(case, aggregation, "none") for case in OBJECTIVE_CASES for aggregation in AGGREGATION_PARAMS] + [
    (case, list(AGGREGATION_PARAMS)[(i + j) % len(AGGREGATION_PARAMS)], correction_case)
    for i, case in enumerate(OBJECTIVE_CASES)
    for j, correction_case in enumerate(CORRECTION_CASES)
    if correction_case != "none"
]
Outcome = tuple[torch.Tensor, torch.Tensor, MetricSums]
WORLD = 4
# CP size -> per data-parallel rank its micro-batches, as indices of responses; order and count differ from the unsplit
CP_LAYOUTS: dict[int, list[list[list[int]]]] = {
    4: [[[9, 2, 0, 3], [1, 8, 7], [4, 5, 6]]],
    2: [[[8, 2], [1, 0, 5]], [[3], [6, 9, 4, 7]]],
}
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all",
               "all_to_all_single", "broadcast", "reduce", "barrier")  # fmt: skip


def run(
    case: Case,
    micro_batches: list[list[int]],
    cp_size: int = 1,
    cp_rank: int = 0,
    cp_group: dist.ProcessGroup | None = None,
    add_over_ranks: Callable[[torch.Tensor], object] = lambda sums: None,
) -> Outcome:
    """This rank's shares of loss and metrics, and its gradient on all log-probs, added over its micro-batches."""
    responses, leaf = make_responses(seed=3)
    leaf.requires_grad_()
    inputs = [pack([responses[i] for i in indices], responses, leaf, cp_size, cp_rank, cp_group)
              for indices in micro_batches]  # fmt: skip
    objective = build_case(*case)
    if objective.needs_preparation:
        sums = torch.stack([objective.measure(one) for one in inputs]).sum(0)
        add_over_ranks(sums)
        objective = objective.prepare(sums)
    outputs = [objective(one) for one in inputs]
    torch.stack([output.loss for output in outputs]).sum().backward()
    assert leaf.grad is not None
    loss = torch.stack([output.loss.detach() for output in outputs]).sum()
    return loss, leaf.grad, merged_sums(*(output.metrics for output in outputs))


@cache
def unsplit(case: Case) -> Outcome:
    return run(case, [list(range(10))])


def assert_same(ours: Outcome, whole: Outcome) -> None:
    torch.testing.assert_close(ours[0], whole[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours[1], whole[1], rtol=1e-11, atol=1e-14)
    assert ours[2].sums.keys() == whole[2].sums.keys()
    for name, (value, denominator) in whole[2].sums.items():
        assert ours[2].sums[name][1] == denominator, name
        assert ours[2].sums[name][0] == pytest.approx(value, rel=1e-10, abs=1e-13), name


@pytest.mark.parametrize("case", CASES, ids=" - ".join)
def test_micro_batches_and_packing_order(case: Case) -> None:
    for micro_batches in (
        [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]],
        [[3], [0, 9, 2], [1, 4, 5, 6, 7, 8]],
    ):
        assert_same(run(case, micro_batches), unsplit(case))


@pytest.mark.parametrize("case", OBJECTIVE_CASES)
def test_one_response_a_micro_batch(case: str) -> None:
    assert_same(run((case, "token-mean", "none"), [[i] for i in range(10)]), unsplit((case, "token-mean", "none")))


def share_of_rank() -> dict:
    rank = dist.get_rank()
    calls: list[tuple[int, ...]] = []
    all_reduce = dist.all_reduce

    def counted_all_reduce(tensor: torch.Tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    def forbidden(*args, **kwargs):
        raise AssertionError("an objective may use nothing but one all_reduce")

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group_of = {4: dist.group.WORLD, 2: pairs[rank // 2]}
    dist.all_reduce = counted_all_reduce  # what the objectives see; the test's own sums go through the original
    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    for name in COLLECTIVES:
        setattr(dist, name, forbidden)
    results = {}
    for cp_size, layout in CP_LAYOUTS.items():
        micro_batches = layout[rank // cp_size]
        for case in CASES:
            calls.clear()
            loss, gradient, metrics = run(case, micro_batches, cp_size, rank % cp_size, group_of[cp_size], all_reduce)
            results[cp_size, case] = loss, gradient, metrics.sums, list(calls), [len(m) for m in micro_batches]
    dist.all_reduce = all_reduce
    for name, original in originals.items():
        setattr(dist, name, original)
    return results


@pytest.fixture(scope="module")
def shares() -> list[dict]:
    """What each of four gloo ranks returned, all layouts and cases in one start."""
    return run_ranks(share_of_rank, WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", CP_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=" - ".join)
def test_context_and_data_parallel_shares_add_up(shares: list[dict], case: Case, cp_size: int) -> None:
    parts = [share[cp_size, case] for share in shares]
    total = merged(MetricSums(sums) for _, _, sums, _, _ in parts)
    assert_same((sum(p[0] for p in parts), sum(p[1] for p in parts), total), unsplit(case))


@pytest.mark.slow
def test_one_small_all_reduce_per_micro_batch_forward_and_backward(shares: list[dict]) -> None:
    for share in shares:
        for (_, case), (*_, calls, sizes) in share.items():
            passes = 2 if build_case(*case).needs_preparation else 1
            assert calls == [(size, 3) for size in sizes] * passes
