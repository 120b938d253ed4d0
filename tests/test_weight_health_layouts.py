"""PolicyTrainer reports the same sequence weights on one rank and on two, each response once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tiny_run import make_run
from weighed_samples import log_weights, make_samples

from megatron_vespo.config.load import load_config
from megatron_vespo.objectives import build_objective
from megatron_vespo.observe.weight_health import health_metrics
from megatron_vespo.policy.response_weights import weigh_trained
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.weight_table import WeightTable, stacked

pytestmark = pytest.mark.slow

LENGTHS = [12, 5, 1, 20, 9, 16, 33, 4, 25, 11, 2, 18]
OBJECTIVES = ("vespo", "bapo")
# So small a rate moves no weight: every update sees the same policy, and several micro-batches make it.
SETTINGS = ["optimizer.lr=1e-12", "rollout.temperature=0.8", "train.tokens_per_micro_batch=64"]


@dataclass
class Reported:
    positions: list[int]
    logprobs: list[np.ndarray]
    weights: WeightTable
    metrics: dict[str, tuple[float, float]]


def samples_around(logprobs: dict[int, np.ndarray]) -> list[Sample]:
    """Samples whose engine and old log-probs lie around the policy's own."""
    samples = make_samples(LENGTHS, engine=0.05, stale=0.1, masked=0.15)
    for i, sample in enumerate(samples):
        shift = logprobs[i] - sample.train_logprobs
        sample.old_logprobs, sample.rollout_logprobs = sample.old_logprobs + shift, sample.rollout_logprobs + shift
    return samples


def update(config_file: Path, overrides: list[str], samples: list[Sample] | None):
    """(samples, objective -> what this rank reports); without ``samples`` they are made, on a single rank."""
    from megatron_vespo import platform
    from megatron_vespo.policy.trainer import PolicyTrainer

    platform.current().prepare_megatron(1)
    trainer = PolicyTrainer(load_config(config_file, overrides).run)
    if samples is None:
        samples = make_samples(LENGTHS, engine=0.05, stale=0.1)
        samples = samples_around(trainer.compute_logprobs(samples, 0.8))
    found = {}
    for name in OBJECTIVES:
        trainer.objective = build_objective(name)
        result = trainer.train_mini_batch(samples)
        found[name] = Reported(
            list(result.logprobs), list(result.logprobs.values()), result.weights, dict(result.metrics)
        )
    return samples, found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def single(config: Path) -> tuple[list[Sample], dict[str, Reported]]:
    return run_ranks(update, 1, config, ["cluster.ranks_per_node=1", *SETTINGS], None)[0]


def assert_same(ours: WeightTable, theirs: WeightTable, tolerance: float) -> None:
    for name in WeightTable.__slots__:
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance, err_msg=name
        )


def in_order(reports: list[Reported]) -> WeightTable:
    positions = [position for report in reports for position in report.positions]
    assert sorted(positions) == list(range(len(LENGTHS)))  # each by one rank
    return stacked([report.weights for report in reports]).rows(np.argsort(positions))


@pytest.mark.parametrize("layout", ["tensor=1", "pipeline=2", "context=2"])
def test_two_ranks_report_the_table_of_one(config: Path, single, layout: str) -> None:
    samples, alone = single
    ranks = run_ranks(update, 2, config, [f"parallel.{layout}", *SETTINGS], samples)
    for name in OBJECTIVES:
        ours, theirs = in_order([found[name] for _, found in ranks]), in_order([alone[name]])
        # The log-probs of two layouts differ by float32 rounding, their sums over 33 tokens by a few times that.
        assert_same(ours, theirs, 2e-5)
        assert health_metrics(ours) == pytest.approx(health_metrics(theirs), rel=1e-3, abs=1e-4)


def test_the_rows_are_those_of_the_reported_logprobs_and_the_objectives_own_metrics(single) -> None:
    samples, alone = single
    for name, report in alone.items():
        for position, logprobs in zip(report.positions, report.logprobs, strict=True):
            samples[position].train_logprobs, samples[position].trained_version = logprobs, 0
        table = in_order([report])
        for row, sample in enumerate(samples):
            assert (table.log_w_stale[row], table.log_w_engine[row]) == pytest.approx(log_weights(sample), abs=1e-9)
        # The same from what would be stored, BAPO's search included; and what the update reported by all-reduce.
        assert_same(table, weigh_trained(build_objective(name), samples), 1e-9)
        counted = table.rows(table.lengths > 0)
        for quantity in ("log_w", "log_w_stale", "log_w_engine"):
            total, count = report.metrics[f"{quantity}/mean"]
            assert (total, count) == pytest.approx((getattr(counted, quantity).sum(), len(counted)), rel=1e-6)
    phi, signs = alone["vespo"].weights.phi, alone["vespo"].weights.advantages
    total, count = alone["vespo"].metrics["phi_negative/mean"]
    chosen = (signs < 0) & (alone["vespo"].weights.lengths > 0)
    assert (total, count) == pytest.approx((phi[chosen].sum(), chosen.sum()), rel=1e-6)
