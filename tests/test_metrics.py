"""Metrics do not depend on how the numbers were split, and a missing group is missing, not zero."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_vespo.observe.metrics import MetricSums, merged
from megatron_vespo.observe.timing import PhaseTimer, Span, seconds_by_phase


def test_any_split_over_micro_batches_and_ranks_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    weights = np.exp(rng.normal(0, 1, size=97))
    n, mean = len(weights), weights.mean()
    ess = weights.sum() ** 2 / (n * (weights**2).sum())
    for cuts in ([], [1], [13, 14, 60], sorted(rng.choice(96, 20, replace=False) + 1)):
        parts = []
        for part in np.split(weights, cuts):
            sums = MetricSums()
            sums.add_moments("w", part)
            sums.add_maximum("w/max", part.max())
            parts.append(MetricSums.from_dict(json.loads(json.dumps(sums.to_dict()))))  # as it crosses processes
        means = merged(parts).means()
        assert means["w/mean"] == pytest.approx(mean, rel=1e-12)
        assert means["w/std"] == pytest.approx(weights.std(), rel=1e-9)
        assert means["w/ess"] == pytest.approx(ess, rel=1e-12)
        assert means["w/max"] == weights.max()


def test_a_part_without_negative_responses_neither_counts_nor_gives_zero() -> None:
    with_negatives, without = MetricSums(), MetricSums()
    with_negatives.add_values("phi_negative/mean", [0.5, 0.7])
    without.add_values("phi_negative/mean", [])
    assert without.means() == {}
    assert merged([with_negatives, without]).means()["phi_negative/mean"] == pytest.approx(0.6)


def test_tensors_of_any_dtype_are_added_with_their_denominators() -> None:
    sums = MetricSums()
    for total, count in ((3.0, 2), (5.0, 6)):
        sums.add_tensors({"x": (torch.tensor(total), torch.tensor(count)), "y": (torch.tensor(1.0), torch.tensor(0.0))})
    sums.add_tensors({})
    assert sums.means() == {"x": 1.0}


def test_phases_add_up_and_do_not_nest() -> None:
    timer = PhaseTimer()
    for name, seconds in (("rollout", 0.02), ("train", 0.01), ("rollout", 0.02)):
        with timer.phase(name):
            time.sleep(seconds)
    spans = timer.take()
    assert [span.phase for span in spans] == ["rollout", "train", "rollout"]
    assert all(span.start < span.end <= following.start + 1e-3 for span, following in pairwise(spans))
    seconds = seconds_by_phase(spans)
    assert seconds["rollout"] >= 0.04 and 0.01 <= seconds["train"] < seconds["rollout"]
    assert timer.take() == []
    with timer.phase("a"), pytest.raises(RuntimeError, match="'b' was begun inside phase 'a'"), timer.phase("b"):
        pass
    with timer.phase("c"):
        pass
    assert [span.phase for span in timer.take()] == ["a", "c"]


def test_phases_of_two_threads_may_overlap() -> None:
    timer = PhaseTimer()

    def work() -> None:
        with timer.phase("rollout"):
            time.sleep(0.02)

    thread = threading.Thread(target=work)
    with timer.phase("train"):
        thread.start()
        thread.join()
    assert {span.phase for span in timer.take()} == {"rollout", "train"}


def test_seconds_keep_the_order_in_which_phases_began() -> None:
    spans = [Span("sync", 5.0, 6.0), Span("rollout", 0.0, 3.0), Span("train", 3.0, 5.0)]
    assert list(seconds_by_phase(spans).items()) == [("rollout", 3.0), ("train", 2.0), ("sync", 1.0)]
