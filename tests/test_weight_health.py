"""Sequence-weight health: every number against loops over the responses, exact under any cut, absent without data."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from weighed_samples import log_weights, make_samples

from megatron_vespo.objectives import build_objective
from megatron_vespo.objectives.coefficients import response_weights
from megatron_vespo.observe.weight_health import health_metrics, length_bins
from megatron_vespo.policy import response_weights as module
from megatron_vespo.policy.response_weights import response_inputs, weigh, weigh_trained
from megatron_vespo.samples.weight_table import WeightTable, stacked

LENGTHS = [5, 0, 9, 40, 1, 17, 33, 28, 3, 60, 12, 21, 8, 45, 2]


def vespo_phi(w: float, advantage: float) -> float:
    c1, c2 = (2, 3) if advantage > 0 else (3, 2)
    return w**c1 * math.exp(c2 * (1 - w))


def quantile(values: list[float], share: float) -> float:
    """Between the two nearest of the sorted values, linearly."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def effective_share(weights: list[float]) -> float:
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


def slope(lengths: list[float], values: list[float], signs: list[bool]) -> float:
    """The first coefficient of values ~ length + positive + negative, by the pseudo-inverse."""
    design = np.array([[n, sign, not sign] for n, sign in zip(lengths, signs, strict=True)], float)
    return float(np.linalg.lstsq(design, np.array(values), rcond=None)[0][0])


def test_every_number_equals_a_loop_over_the_responses() -> None:
    # So wild that some of either sign are dead.
    samples = make_samples(LENGTHS, engine=0.25, stale=0.5, masked=0.2)
    found = health_metrics(weigh_trained(build_objective("vespo"), samples))
    counted = [s for s in samples if s.loss_mask.any()]
    assert len(counted) == len(samples) - 1
    weighed = [s for s in counted if s.advantage]
    expected: dict[str, float] = {}
    for part, of in (("", sum), ("_stale", lambda pair: pair[0]), ("_engine", lambda pair: pair[1])):
        log_w = {id(s): of(log_weights(s)) for s in counted}
        for q in (5, 25, 50, 75, 95):
            expected[f"log_w{part}/p{q:02d}"] = quantile(list(log_w.values()), q / 100)
        expected[f"ess_w{part}"] = effective_share([math.exp(x) for x in log_w.values()])
        phi = {id(s): vespo_phi(math.exp(log_w[id(s)]), s.advantage) for s in weighed}
        expected[f"ess_phi{part}"] = effective_share(list(phi.values()))
        for name, sign in (("positive", 1), ("negative", -1)):
            dead = [phi[id(s)] < 0.01 for s in weighed if s.advantage * sign > 0]
            expected[f"dead_{name}{part}"] = sum(dead) / len(dead)
        tokens = [float(s.loss_mask.sum()) for s in weighed]
        expected[f"phi_slope{part}"] = 1000 * slope(tokens, list(phi.values()), [s.advantage > 0 for s in weighed])
    assert 0 < expected["dead_positive"] < 1 and 0 < expected["dead_negative"] < 1
    assert found == {f"health/{name}": pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in expected.items()}


def test_a_steps_numbers_do_not_depend_on_its_mini_batches_or_the_order() -> None:
    table = weigh_trained(build_objective("vespo"), make_samples(LENGTHS, engine=0.1, stale=0.1))
    whole = health_metrics(table)
    order = np.random.default_rng(1).permutation(len(table))
    for cuts in ([1], [4, 5, 12]):
        parts = [table.rows(some) for some in np.split(order, cuts)]
        assert health_metrics(stacked(parts)) == pytest.approx(whole, rel=1e-12)


def table_of(lengths: list[float], advantages: list[float], log_w: list[float]) -> WeightTable:
    phi = [vespo_phi(math.exp(w), a) if a else math.nan for w, a in zip(log_w, advantages, strict=True)]
    columns = [lengths, advantages, log_w, [0.0] * len(lengths), phi, phi, phi]
    return WeightTable(*(np.array(column, float) for column in columns))


def test_what_has_no_data_is_absent_and_not_zero() -> None:
    assert health_metrics(table_of([], [], [])) == {} == health_metrics(table_of([0], [1.0], [0.0]))
    no_advantage = health_metrics(table_of([3, 4], [0.0, 0.0], [0.1, 0.2]))
    assert "health/ess_w" in no_advantage and "health/log_w/p50" in no_advantage
    assert not [name for name in no_advantage if "phi" in name or "dead" in name]
    positive = health_metrics(table_of([3, 4], [1.0, 2.0], [0.1, 0.2]))
    assert positive["health/dead_positive"] == 0 and "health/phi_slope" in positive
    assert not [name for name in positive if "negative" in name]
    # Lengths differ between the signs, not within one: no slope, however different their phi.
    assert "health/phi_slope" not in health_metrics(table_of([3, 9], [1.0, -1.0], [0.1, 0.2]))


def test_weights_beyond_the_range_of_exp_still_have_an_ess() -> None:
    found = health_metrics(table_of([5, 5, 5, 5], [0.0] * 4, [900.0, 900.0, -900.0, 0.0]))
    assert found["health/ess_w"] == pytest.approx(0.5)


def test_a_broken_response_is_not_counted_as_alive() -> None:
    table = table_of([3, 4], [1.0, 1.0], [0.1, math.nan])
    assert math.isnan(health_metrics(table)["health/dead_positive"])


def test_all_weights_gone_is_an_ess_of_zero() -> None:
    table = replace(table_of([3, 4], [1.0, 1.0], [-900.0, -900.0]), phi=np.zeros(2))
    found = health_metrics(table)
    assert found["health/ess_phi"] == 0 and found["health/dead_positive"] == 1 and found["health/phi_slope"] == 0


@pytest.mark.parametrize("tokens_at_once", [1, 50, 10**6])
def test_parts_of_any_size_give_the_same_rows(monkeypatch: pytest.MonkeyPatch, tokens_at_once: int) -> None:
    samples = make_samples(LENGTHS, engine=0.1, stale=0.3, masked=0.1)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens_at_once)
    table = weigh(build_objective("vespo"), samples, [s.train_logprobs for s in samples])
    assert table.lengths.tolist() == [s.loss_mask.sum() for s in samples]
    assert table.advantages.tolist() == pytest.approx([s.advantage for s in samples])
    for sample, row in zip(samples, range(len(table)), strict=True):
        stale, engine = log_weights(sample)
        assert (table.log_w_stale[row], table.log_w_engine[row]) == pytest.approx((stale, engine), abs=1e-12)
        assert table.log_w[row] == pytest.approx(stale + engine, abs=1e-12)
        if sample.advantage and sample.loss_mask.any():
            phi = vespo_phi(math.exp(stale + engine), sample.advantage)
            assert table.phi[row] == pytest.approx(phi, rel=1e-9)


@pytest.mark.parametrize("name", ["bapo", "m2po"])
def test_stored_samples_are_weighed_update_by_update(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An objective that searches its bounds searches them in each mini-batch, however it is cut here."""
    samples = make_samples(LENGTHS * 4, engine=0.05, stale=0.3, updates=3)
    objective = build_objective(name)
    expected = []
    for version in range(3):
        members = [s for s in samples if s.trained_version == version]
        inputs = response_inputs(members, [s.train_logprobs for s in members])
        expected += response_weights(objective.prepare(objective.measure(inputs)), inputs).phi.tolist()
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 100)
    found = weigh_trained(objective, samples).phi
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    together = response_inputs(samples, [s.train_logprobs for s in samples])
    across = response_weights(objective.prepare(objective.measure(together)), together).phi.numpy()
    assert not np.allclose(found, across, rtol=1e-6, equal_nan=True)


def test_untrained_samples_have_no_row() -> None:
    samples = make_samples([4, 5], engine=0.1)
    samples[0].trained_version = None
    assert weigh_trained(build_objective("vespo"), samples).lengths.tolist() == [5]


def test_ranges_of_lengths_hold_every_response_once_and_never_part_equal_lengths() -> None:
    lengths = np.array([9, 3, 3, 3, 3, 3, 3, 50, 12, 50, 50, 7])
    bins = length_bins(lengths, 4)
    assert sorted(np.concatenate(bins).tolist()) == list(range(12))
    spans = [(lengths[members].min(), lengths[members].max()) for members in bins]
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    assert len(bins) > 1
    assert [len(members) for members in length_bins(np.arange(100), 5)] == pytest.approx([20] * 5, abs=1)
    assert [members.tolist() for members in length_bins(np.full(3, 7), 5)] == [[0, 1, 2]]
    assert length_bins(np.array([]), 5) == []
