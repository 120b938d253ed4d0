"""The other objectives by hand: published values, and the searches over a mini-batch."""

import math

import pytest
import torch
from objective_data import inputs_of, means, ready

from megatron_vespo.objectives import (
    ObjectiveInputs,
    available_objectives,
    build_objective,
    ess_step_scale,
    group_advantages,
    published_settings,
)
from megatron_vespo.objectives.aggregation import AGGREGATIONS

# log W, phi of A >= 0, phi of A < 0; nine digits
RESPO_TABLE = [
    (-5.0, 1.3591102, 0.514700553),
    (-2.0, 1.34776215, 1.3024422),
    (-1.0, 1.28689851, 1.33234251),
    (-0.5, 1.19053066, 1.21215338),
    (-0.1, 1.04750596, 1.04868935),
    (0.0, 1.0, 1.0),
    (0.1, 0.947506541, 0.948814287),
    (0.5, 0.692261526, 0.727565803),
    (1.0, 0.333481689, 0.450479575),
    (2.0, 7.04614043e-3, 0.0874608813),
    (3.0, 5.42264656e-8, 4.23921088e-3),
]


def gradient(name: str, inputs: ObjectiveInputs, **params) -> list[float]:
    ready(build_objective(name, **params), [inputs])(inputs).loss.backward()
    assert inputs.logprobs.grad is not None
    return inputs.logprobs.grad.tolist()


def logs(*ratios: float) -> list[float]:
    return [math.log(r) for r in ratios]


@pytest.mark.parametrize(("log_w", "positive", "negative"), RESPO_TABLE)
def test_respo_gradient_is_the_published_table(log_w: float, positive: float, negative: float) -> None:
    for advantage, phi in ((0.5, positive), (-0.5, negative)):
        grad = gradient("respo", inputs_of([[log_w * share for share in (0.7, -0.2, 0.5)]], [advantage]))
        assert grad == pytest.approx([-phi * advantage] * 3, rel=5e-9)


def test_respo_takes_other_orders_by_their_formula() -> None:
    """a = 3, b = 0.25, lambda = 1 at W = 2: phi0 = (0.75 + 0.25 * 4)^(1/2)."""
    phi0 = math.sqrt(1.75)
    grad = gradient("respo", inputs_of([logs(2.0)], [1.0]), positive=(3.0, 0.25, 1.0))
    assert grad == pytest.approx([-phi0 * math.exp(1 - phi0)], rel=1e-12)


@pytest.mark.parametrize(("power", "log_w"), [(0.0, 0.9), (0.5, 0.3), (1.0, 0.1)])
def test_the_length_ablations_of_vespo(power: float, log_w: float) -> None:
    """Nine tokens of 0.1: log W = 0.9, 0.9 / sqrt(9), 0.9 / 9."""
    phi = math.exp(2 * log_w + 3 * (1 - math.exp(log_w)))
    assert gradient("vespo", inputs_of([[0.1] * 9], [1.0]), length_power=power) == pytest.approx([-phi] * 9, rel=1e-12)


def test_topr_weighs_only_negative_responses_and_at_most_by_one() -> None:
    rows = [logs(0.5, 0.5), logs(2.0, 2.0), logs(0.5, 0.5), logs(2.0, 2.0)]
    grad = gradient("topr", inputs_of(rows, [1.0, 1.0, -1.0, -1.0]))
    assert grad == pytest.approx([-1, -1, -1, -1, 0.25, 0.25, 1, 1], rel=1e-12)


def test_plain_importance_weights_of_sequences_and_tokens() -> None:
    rows = [logs(4.0, 0.5)]
    for params, expected in (
        ({}, [-2.0, -2.0]),
        ({"cap": 1.5}, [-1.5, -1.5]),
        ({"level": "token"}, [-4.0, -0.5]),
        ({"level": "token", "cap": 3.0}, [-3.0, -0.5]),
    ):
        assert gradient("importance_sampling", inputs_of(rows, [1.0]), **params) == pytest.approx(expected, rel=1e-12)


def test_cispo_never_takes_a_gradient_away() -> None:
    rows = [logs(7.0, 1.0, 0.01)]
    assert gradient("cispo", inputs_of(rows, [1.0])) == pytest.approx([-5.0, -1.0, -0.01], rel=1e-12)
    assert gradient("cispo", inputs_of(rows, [-1.0]), low=0.8) == pytest.approx([5.0, 1.0, 0.8], rel=1e-12)


def probabilities(p: list[float], q: list[float], advantage: float) -> ObjectiveInputs:
    """One response of tokens with these probabilities under the policy (p) and the behaviour policy (q)."""
    policy, behaviour = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    inputs = inputs_of([[0.0] * len(p)], [advantage])
    return ObjectiveInputs(
        logprobs=policy.requires_grad_(), old_logprobs=behaviour, rollout_logprobs=behaviour, mask=inputs.mask,
        segment_ids=inputs.segment_ids, advantages=inputs.advantages, num_segments=1, total_tokens=1.0,
        total_sequences=1.0,
    )  # fmt: skip


def test_dppo_lets_rare_tokens_grow_and_stops_likely_ones() -> None:
    """p - q = 0.09 at ratio 10 stays; 0.2 at ratio 1.4 goes, if A pushes it on; the cap holds at 20."""
    p, q = [0.10, 0.70, 0.30, 0.04], [0.01, 0.50, 0.50, 0.001]
    grad = gradient("dppo", probabilities(p, q, 1.0))
    assert grad == pytest.approx([-10.0, 0.0, -0.6, -20.0], rel=1e-12)
    assert gradient("dppo", probabilities(p, q, -1.0)) == pytest.approx([10.0, 1.4, 0.0, 20.0], rel=1e-12)


def test_dppo_by_binary_kl() -> None:
    """KL(Bernoulli(0.5) || Bernoulli(0.7)) = 0.0872, of 0.5 || 0.55 0.0050, of 0.9 || 0.97 0.0530 (TV says 0.07)."""
    grad = gradient("dppo", probabilities([0.7, 0.55, 0.97], [0.5, 0.5, 0.9], 1.0), divergence="kl")
    assert grad == pytest.approx([0.0, -1.1, 0.0], rel=1e-12)
    grad = gradient("dppo", probabilities([0.7, 0.55, 0.97], [0.5, 0.5, 0.9], 1.0), divergence="kl", delta=0.06)
    assert grad == pytest.approx([0.0, -1.1, -0.97 / 0.9], rel=1e-12)


def test_oapl_is_a_regression_whose_loss_is_the_published_one() -> None:
    """(beta log W - A)^2 with beta = 1e-3: its mean over responses, its derivative on every token."""
    rows, advantages = [[0.5, 1.5], [-3.0]], [0.25, -0.75]
    inputs = inputs_of(rows, advantages, total_sequences=2.0)
    output = build_objective("oapl", aggregation="seq-mean-token-sum")(inputs)
    output.loss.backward()
    residuals = [1e-3 * 2.0 - 0.25, 1e-3 * -3.0 + 0.75]
    assert float(output.loss.detach()) == pytest.approx(sum(x * x for x in residuals) / 2, rel=1e-12)
    first, second = (2 * 1e-3 * x / 2 for x in residuals)
    assert inputs.logprobs.grad.tolist() == pytest.approx([first, first, second], rel=1e-12)


def test_the_soft_value_of_a_group() -> None:
    """V = log mean exp(r): of rewards 1, 0 it is log((e + 1) / 2); at temperature 0.01 nearly the best reward."""
    rewards, ids = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64), torch.tensor([0, 0, 1])
    value = math.log((math.e + 1) / 2)
    assert group_advantages(rewards, ids, "group-soft-value").tolist() == pytest.approx([1 - value, -value, 0.0])
    cold = group_advantages(rewards, ids, "group-soft-value", temperature=0.01)
    assert cold.tolist() == pytest.approx([0.01 * math.log(2), 0.01 * math.log(2) - 1, 0.0])
    with pytest.raises(ValueError, match="temperature must be positive"):
        group_advantages(rewards, ids, "group-soft-value", temperature=0.0)


def test_gspo_token_is_gspo_while_advantages_are_one_a_response() -> None:
    """Section 4.3 of the paper: against the sequence form, differentiated through the mean over tokens."""
    rows, advantages = [[0.0001, 0.0005], [-0.0002, 0.0001, 0.0]], [1.0, -1.0]
    inputs = inputs_of(rows, advantages)
    leaf = inputs.logprobs.detach().clone().requires_grad_()
    difference = leaf - inputs.rollout_logprobs
    ratios = torch.stack([difference[:2].mean().exp(), difference[2:].mean().exp()])
    (-(ratios * inputs.advantages).mean()).backward()
    inputs.total_sequences = 2.0
    grad = gradient("gspo_token", inputs, aggregation="seq-mean-token-mean")
    assert grad == pytest.approx(leaf.grad.tolist(), rel=1e-9)


def test_dapo_and_dr_grpo_are_grpo_with_their_clips() -> None:
    for advantage in (1.0, -1.0):
        inputs = [inputs_of([logs(1.25, 1.5, 0.7, 9.0)], [advantage]) for _ in range(4)]
        assert gradient("dapo", inputs[0]) == gradient("grpo", inputs[1], dual_clip=None)
        assert gradient("dr_grpo", inputs[2]) == gradient("grpo", inputs[3], clip_high=0.2, dual_clip=None)


def test_published_settings_are_settings_that_exist() -> None:
    assert published_settings("dr_grpo") == {"aggregation": "constant", "advantage": "group-mean"}
    assert published_settings("oapl")["advantage"] == "group-soft-value"
    assert published_settings("my.own.objective") == {}
    for name in available_objectives():
        settings = published_settings(name)
        assert settings.get("aggregation", "token-mean") in AGGREGATIONS
        group_advantages(torch.zeros(1), torch.zeros(1, dtype=torch.int64), settings.get("advantage", "group-mean"))


def found_bounds(rows: list[list[float]], advantages: list[float], **params) -> tuple[float, float]:
    inputs = inputs_of(rows, advantages)
    metrics = means(ready(build_objective("bapo", **params), [inputs])(inputs).metrics)
    return metrics["clip_low"], metrics["clip_high"]


def test_bapo_raises_the_upper_bound_until_the_target_is_met() -> None:
    """A positive token of ratio 2, a negative one of ratio 1: share c / (c + 1) reaches 0.6 at c = 1.5."""
    rows, advantages = [logs(2.0), logs(1.0)], [1.0, -1.0]
    assert found_bounds(rows, advantages, target=0.599) == pytest.approx((0.6, 1.5))
    assert found_bounds(rows, advantages, target=0.4) == pytest.approx((0.6, 1.2))  # met at once
    assert found_bounds(rows, advantages, target=0.9) == pytest.approx((0.9, 3.0))  # never met: both at their ends
    assert found_bounds(rows, advantages, target=0.599, raise_first="low") == pytest.approx((0.9, 1.5))


def test_bapo_without_a_sign_stays_where_it_starts_or_ends() -> None:
    assert found_bounds([logs(2.0)], [1.0]) == pytest.approx((0.6, 1.2))
    assert found_bounds([logs(2.0)], [-1.0]) == pytest.approx((0.9, 3.0))
    assert found_bounds([logs(2.0)], [0.0]) == pytest.approx((0.6, 1.2))


def test_m2po_drops_the_largest_until_the_mean_is_small_enough() -> None:
    """Squares .01, .04, .09, 1: means .01, .025, .0467, ...: with 0.04 two stay. Harmless tokens are never dropped."""
    rows = [[0.1, 0.2, 0.3, 1.0, -2.0], [0.5, -0.3]]
    grad = gradient("m2po", inputs_of(rows, [1.0, -1.0]))
    expected = [-math.exp(0.1), -math.exp(0.2), 0, 0, -math.exp(-2.0), math.exp(0.5), 0]
    assert grad == pytest.approx(expected, rel=1e-12)
    assert 0.0 not in gradient("m2po", inputs_of(rows, [1.0, -1.0]), threshold=1.0)


@pytest.mark.parametrize("name", ["bapo", "m2po"])
def test_a_search_must_be_told_about_the_whole_mini_batch(name: str) -> None:
    inputs = inputs_of([[0.1]], [1.0])
    objective = build_objective(name)
    assert objective.needs_preparation
    with pytest.raises(RuntimeError, match="over the whole mini-batch"):
        objective(inputs)
    assert not objective.prepare(objective.measure(inputs)).needs_preparation


def test_an_objective_without_a_search_says_so() -> None:
    objective = build_objective("vespo")
    assert not objective.needs_preparation
    with pytest.raises(RuntimeError, match="nothing to search"):
        objective.measure(inputs_of([[0.1]], [1.0]))


@pytest.mark.parametrize("name", ["bapo", "m2po"])
def test_a_search_over_nothing_leaves_the_loss_alone(name: str) -> None:
    inputs = inputs_of([[0.1, 0.2]], [1.0], masked={(0, 0), (0, 1)})
    assert gradient(name, inputs) == [0.0, 0.0]


def test_the_step_follows_the_effective_sample_size() -> None:
    """Weights 1, 1, 2: (sum)^2 / (n sum of squares) = 16 / 18."""
    inputs = inputs_of([[0.0], [0.0], logs(1.5, 4 / 3)], [1.0, -1.0, 1.0])
    output = build_objective("importance_sampling", cap=1.0)(inputs)
    sums = {name: (float(total), float(count)) for name, (total, count) in output.metrics.items()}
    assert ess_step_scale(sums) == pytest.approx(math.sqrt(16 / 18), rel=1e-12)
    assert ess_step_scale(sums, "phi") == 1.0  # all capped at 1
    assert ess_step_scale({"w/mean": (0.0, 0.0), "w/mean_square": (0.0, 0.0)}) == 0.0
    with pytest.raises(ValueError, match="reports moments of: log_w"):
        ess_step_scale(sums, "psi")
