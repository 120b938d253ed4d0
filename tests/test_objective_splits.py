"""Loss, gradient and metrics do not depend on how a mini-batch is split: micro-batches, packing order, DP and CP."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from objective_data import AGGREGATION_PARAMS, OBJECTIVE_NAMES, make_responses, pack

from megatron_vespo.objectives import Metric, add_metrics, build_objective, summarize_metrics

CASES = [(name, aggregation) for name in OBJECTIVE_NAMES for aggregation in AGGREGATION_PARAMS]
WORLD = 4
# CP size -> per data-parallel rank its micro-batches, as indices of responses; order and count differ from the unsplit
CP_LAYOUTS: dict[int, list[list[list[int]]]] = {
    4: [[[9, 2, 0, 3], [1, 8, 7], [4, 5, 6]]],
    2: [[[8, 2], [1, 0, 5]], [[3], [6, 9, 4, 7]]],
}
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all",
               "all_to_all_single", "broadcast", "reduce", "barrier")  # fmt: skip


def run(
    case: tuple[str, str],
    micro_batches: list[list[int]],
    cp_size: int = 1,
    cp_rank: int = 0,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
    """This rank's shares of loss and metrics, and its gradient on all log-probs, added over its micro-batches."""
    name, aggregation = case
    responses, leaf = make_responses(seed=3)
    leaf.requires_grad_()
    objective = build_objective(name, aggregation=aggregation, **AGGREGATION_PARAMS[aggregation])
    loss, metrics = torch.zeros((), dtype=torch.float64), []
    for indices in micro_batches:
        micro_batch = [responses[i] for i in indices]
        output = objective(pack(micro_batch, responses, leaf, cp_size, cp_rank, cp_group))
        output.loss.backward()
        loss += output.loss.detach()
        metrics.append(output.metrics)
    assert leaf.grad is not None
    return loss, leaf.grad, add_metrics(metrics)


def assert_same(
    ours: tuple[torch.Tensor, torch.Tensor, dict[str, Metric]],
    whole: tuple[torch.Tensor, torch.Tensor, dict[str, Metric]],
) -> None:
    torch.testing.assert_close(ours[0], whole[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours[1], whole[1], rtol=1e-11, atol=1e-14)
    assert ours[2].keys() == whole[2].keys()
    for name, (value, denominator) in whole[2].items():
        assert float(ours[2][name][1]) == float(denominator), name
        assert float(ours[2][name][0]) == pytest.approx(float(value), rel=1e-10, abs=1e-13), name
    assert summarize_metrics(ours[2]) == pytest.approx(summarize_metrics(whole[2]), rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize(
    "micro_batches",
    [[[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]], [[i] for i in range(10)], [[3], [], [0, 9, 2], [1, 4, 5, 6, 7, 8]]],
    ids=["reversed", "one each", "uneven"],
)
def test_micro_batches_and_packing_order(case: tuple[str, str], micro_batches: list[list[int]]) -> None:
    micro_batches = [indices for indices in micro_batches if indices]
    assert_same(run(case, micro_batches), run(case, [list(range(10))]))


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    calls: list[tuple[int, ...]] = []
    all_reduce = dist.all_reduce

    def counted_all_reduce(tensor: torch.Tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    def forbidden(*args, **kwargs):
        raise AssertionError("an objective may use nothing but one all_reduce")

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group_of = {4: dist.group.WORLD, 2: pairs[rank // 2]}
    dist.all_reduce = counted_all_reduce
    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    for name in COLLECTIVES:
        setattr(dist, name, forbidden)
    results = {}
    for cp_size, layout in CP_LAYOUTS.items():
        micro_batches = layout[rank // cp_size]
        for case in CASES:
            calls.clear()
            share = run(case, micro_batches, cp_size, rank % cp_size, group_of[cp_size])
            results[cp_size, case] = (*share, list(calls), [len(indices) for indices in micro_batches])
    dist.all_reduce = all_reduce
    for name, original in originals.items():
        setattr(dist, name, original)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of four gloo ranks returned, all layouts and cases in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(rank_main, args=(str(folder),), nprocs=WORLD, join=True)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", CP_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_context_and_data_parallel_shares_add_up(shares: list[dict], case: tuple[str, str], cp_size: int) -> None:
    parts = [share[cp_size, case] for share in shares]
    total = (sum(p[0] for p in parts), sum(p[1] for p in parts), add_metrics(p[2] for p in parts))
    assert_same(total, run(case, [list(range(10))]))


@pytest.mark.slow
def test_one_small_all_reduce_per_micro_batch_forward_and_backward(shares: list[dict]) -> None:
    for share in shares:
        for *_, calls, sizes in share.values():
            assert calls == [(size, 3) for size in sizes]
