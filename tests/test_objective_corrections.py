"""The corrections by hand, and the traps that other implementations fell into (vespo.md, sections 5 and 6)."""

import math

import pytest
import torch
from objective_data import (
    AGGREGATION_PARAMS,
    CORRECTION_CASES,
    OBJECTIVE_CASES,
    Response,
    build_case,
    inputs_of,
    make_responses,
    means,
    pack,
    ready,
)

from megatron_vespo.objectives import ObjectiveInputs, build_objective


def with_engine_gap(log_engine: list[list[float]], advantages: list[float], **options) -> ObjectiveInputs:
    """On policy but for the engine: log pi = log pi_old, log pi_old - log mu as given."""
    inputs = inputs_of(log_engine, advantages, **options)
    inputs.old_logprobs = inputs.logprobs.detach().clone()
    return inputs


def logs(*ratios: float) -> list[float]:
    return [math.log(r) for r in ratios]


def gradient(name: str, inputs: ObjectiveInputs, correction: str, **params) -> torch.Tensor:
    build_objective(name, correction=correction, correction_params=params)(inputs).loss.backward()
    assert inputs.logprobs.grad is not None
    return inputs.logprobs.grad


def test_split_gives_each_factor_to_its_own() -> None:
    """log W_stale = 0.1 goes through phi (0.890909), W_engine = e^0.4 multiplies."""
    inputs = inputs_of([[0.2, 0.3]], [1.0])
    inputs.old_logprobs += torch.tensor([0.1, 0.3], dtype=torch.float64)
    expected = torch.full((2,), -0.890909209 * math.exp(0.4), dtype=torch.float64)
    torch.testing.assert_close(gradient("vespo", inputs, "split"), expected, rtol=1e-8, atol=0)


def test_a_sequence_weight_is_counted_once_not_once_a_token() -> None:
    """100 tokens of W_engine = 0.99: verl's VESPO with rollout_is=sequence had log W = -1.005 instead of -0.010."""
    rows = [[math.log(0.99) / 100] * 100]
    for correction in ("tis", "split"):
        grad = gradient("vespo", with_engine_gap(rows, [1.0]), correction, level="sequence")
        torch.testing.assert_close(grad, torch.full_like(grad, -0.99), rtol=1e-12, atol=0)


def test_a_sequence_weight_is_a_product_not_a_sum_of_ratios() -> None:
    """1.2 * 0.5 = 0.6; a sum of exps gives 1.7, a mean of them 0.85."""
    grad = gradient("reinforce", with_engine_gap([logs(1.2, 0.5)], [1.0]), "tis", level="sequence")
    torch.testing.assert_close(grad, torch.full_like(grad, -0.6), rtol=1e-12, atol=0)


def test_truncation_is_of_the_level_that_was_asked_for() -> None:
    """3 * 0.5: truncated per token 2 and 0.5 (their product would be 1), per sequence 1.5."""
    rows = [logs(3.0, 0.5)]
    for level, expected in (("token", [-2.0, -0.5]), ("sequence", [-1.5, -1.5])):
        grad = gradient("reinforce", with_engine_gap(rows, [1.0]), "tis", level=level)
        assert grad.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["vespo", "respo", "gspo", "topr", "grpo", "importance_sampling"])
def test_a_masked_token_does_not_zero_its_sequence(name: str) -> None:
    """TRL's token_mask put log 0 into the sum: phi = 2e-15 for the whole response. Only the token itself may go."""
    rows = [logs(1, 9, 1)]
    grad = gradient(name, with_engine_gap(rows, [1.0]), "icepop")
    assert grad.tolist() == pytest.approx([-1.0, 0.0, -1.0], rel=1e-12)


def test_masks_cut_on_both_sides_and_keep_the_weight_between() -> None:
    rows = [logs(0.501), logs(1.999), logs(0.499), logs(2.001)]
    grad = gradient("reinforce", with_engine_gap(rows, [1.0] * 4), "mis")
    assert grad.tolist() == pytest.approx([-0.501, -1.999, 0.0, 0.0], rel=1e-12)


def test_the_geometric_filter_looks_at_the_mean_and_leaves_the_weight() -> None:
    """Means 0.001 (kept, though its product over 1,000 tokens is e) and 0.002 (dropped); no weight either way."""
    inputs = with_engine_gap([[0.0009] * 1000, [0.002] * 10], [1.0, 1.0])
    grad = gradient("reinforce", inputs, "geometric")
    assert (grad[:1000] == -1).all() and (grad[1000:] == 0).all()


def test_opsm_drops_negative_responses_that_the_policy_left() -> None:
    """Mean of log mu - log pi: 0.6, 0.4, 0.6 (but A > 0), -0.6, with delta 0.5."""
    rows = [[-0.2, -1.0], [-0.1, -0.7], [-0.6, -0.6], [0.6, 0.6]]
    grad = gradient("reinforce", inputs_of(rows, [-1.0, -1.0, 1.0, -1.0]), "opsm")
    assert grad.tolist() == [0.0, 0.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0]


def test_opsm_by_the_trainer_does_not_see_the_engine() -> None:
    for behaviour, expected in (("engine", 0.0), ("trainer", 1.0)):
        grad = gradient("reinforce", with_engine_gap([[-0.7]], [-1.0]), "opsm", behaviour=behaviour)
        assert grad.tolist() == [expected]


@pytest.mark.parametrize("case", OBJECTIVE_CASES)
@pytest.mark.parametrize("correction_case", ["none", "opsm"])
def test_no_sign_is_read_from_a_masked_first_token(case: str, correction_case: str) -> None:
    """A negative response whose first token is masked gives what it gives without that token."""
    rows = [[5.0, 0.6, -0.2], [0.1]]

    def grads(rows: list[list[float]], masked: set) -> list[float]:
        inputs = inputs_of(rows, [-1.0, 1.0], masked=masked)
        ready(build_case(case, correction_case=correction_case), [inputs])(inputs).loss.backward()
        return inputs.logprobs.grad[inputs.mask].tolist()

    assert grads(rows, {(0, 0)})[:2] == pytest.approx(grads([rows[0][1:], rows[1]], set())[:2], rel=1e-4)


@pytest.mark.parametrize("correction_case", CORRECTION_CASES)
@pytest.mark.parametrize("case", OBJECTIVE_CASES)
def test_masked_tokens_are_in_no_denominator(case: str, correction_case: str) -> None:
    """Loss and gradient are those of the same responses with the masked tokens cut out: T, N, means and sums alike."""
    responses, leaf = make_responses(seed=4)
    cut = [
        Response(r.positions[r.mask], r.old[r.mask], r.rollout[r.mask], r.mask[r.mask], r.advantage) for r in responses
    ]
    aggregation = list(AGGREGATION_PARAMS)[(list(OBJECTIVE_CASES).index(case) + len(correction_case)) % 4]
    results = []
    for members in (responses, cut):
        ours = leaf.clone().requires_grad_()
        inputs = pack(members, members, ours)
        output = ready(build_case(case, aggregation, correction_case), [inputs])(inputs)
        output.loss.backward()
        results.append((output.loss.detach(), ours.grad, means(output.metrics)))
    (loss, grad, metrics), (cut_loss, cut_grad, cut_metrics) = results
    torch.testing.assert_close(loss, cut_loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad, cut_grad, rtol=1e-12, atol=1e-15)
    assert metrics == pytest.approx(cut_metrics, rel=1e-12)


def test_a_dropped_token_stays_in_the_denominator_and_is_reported() -> None:
    """Denominators are known before the update: 4 tokens, one dropped, the others still weigh 1/4."""
    inputs = with_engine_gap([logs(1, 9, 1, 1)], [1.0], total_tokens=4.0)
    output = build_objective("reinforce", correction="icepop")(inputs)
    output.loss.backward()
    assert inputs.logprobs.grad.tolist() == pytest.approx([-0.25, 0.0, -0.25, -0.25])
    metrics = means(output.metrics)
    assert metrics["correction_kept"] == 0.75 and metrics["correction/mean"] == pytest.approx(0.75)


@pytest.mark.parametrize("correction_case", [c for c in CORRECTION_CASES if c != "trainer" and "trainer" not in c])
def test_a_nan_of_the_engine_is_neither_kept_nor_dropped_in_silence(correction_case: str) -> None:
    inputs = with_engine_gap([[0.0, math.nan]], [-1.0])
    inputs.old_logprobs[:] = inputs.logprobs.detach()[0]
    inputs.logprobs.data[1] = inputs.logprobs.data[0]
    inputs.rollout_logprobs = torch.tensor([-1.0, math.nan], dtype=torch.float64)
    assert build_case("vespo", correction_case=correction_case)(inputs).loss.isnan()


@pytest.mark.parametrize("correction_case", CORRECTION_CASES)
@pytest.mark.parametrize("gap", [-1e4, -30.0, 30.0, 1e4])
def test_extreme_gaps_stay_finite(correction_case: str, gap: float) -> None:
    inputs = with_engine_gap([[gap, 0.0], [0.0]], [1.0, -1.0])
    output = build_case("vespo", correction_case=correction_case)(inputs)
    output.loss.backward()
    assert output.loss.isfinite() and inputs.logprobs.grad.isfinite().all()
    assert all(math.isfinite(value) for value in means(output.metrics).values())
