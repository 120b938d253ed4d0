"""The kernels against published values, and the traps of vespo.md sections 5 and 6."""

import math

import pytest
import torch
from objective_data import AGGREGATION_PARAMS, inputs_of, means, ready

from megatron_vespo.objectives import ObjectiveInputs, ObjectiveOutput, available_objectives, build_objective
from megatron_vespo.objectives.sequence import segment_sums
from megatron_vespo.objectives.vespo import kernel

# log W, phi+ with c = (2, 3), phi- with c = (3, 2); nine digits
VESPO_TABLE = [
    (-5.0, 8.93634377e-4, 2.23007377e-6),
    (-2.0, 0.245120378, 0.0139724106),
    (-1.0, 0.901551308, 0.176266384),
    (-0.5, 1.19770595, 0.490141419),
    (-0.1, 1.08924821, 0.896125476),
    (0.0, 1.0, 1.0),
    (0.1, 0.890909209, 1.09380032),
    (0.5, 0.388227484, 1.22453044),
    (1.0, 0.0426449898, 0.646253358),
    (2.0, 2.58810864e-7, 1.13842199e-3),
    (3.0, 5.48955046e-23, 2.14369797e-13),
]


def run(name: str, inputs: ObjectiveInputs, **options) -> ObjectiveOutput:
    return ready(build_objective(name, **options), [inputs])(inputs)


def gradient(name: str, inputs: ObjectiveInputs, **options) -> torch.Tensor:
    run(name, inputs, **options).loss.backward()
    assert inputs.logprobs.grad is not None
    return inputs.logprobs.grad


@pytest.mark.parametrize(("log_w", "positive", "negative"), VESPO_TABLE)
def test_vespo_gradient_is_the_published_table(log_w: float, positive: float, negative: float) -> None:
    for advantage, phi in ((0.5, positive), (-0.5, negative)):
        split = [log_w * share for share in (0.7, -0.2, 0.5)]  # tokens that partly cancel
        grad = gradient("vespo", inputs_of([split], [advantage]))
        torch.testing.assert_close(grad, torch.full_like(grad, -phi * advantage), rtol=5e-9, atol=0)


def test_vespo_peak_is_where_proposition_c1_puts_it() -> None:
    grid = torch.linspace(-4, 2, 600_001, dtype=torch.float64)
    for (c1, c2), peak in (((2.0, 3.0), 1.208), ((3.0, 2.0), 1.2416)):
        phi = kernel(grid, c1, c2)
        assert float(phi.max()) == pytest.approx((c1 / c2) ** c1 * math.exp(c2 - c1), rel=1e-9)
        assert float(phi.max()) == pytest.approx(peak, abs=5e-4)
        assert math.exp(float(grid[phi.argmax()])) == pytest.approx(c1 / c2, rel=1e-4)


@pytest.mark.parametrize("log_w", [-1e4, -800.0, -30.0, 30.0, 800.0, 1e4])
@pytest.mark.parametrize("name", available_objectives())
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_stay_finite(name: str, log_w: float, advantage: float) -> None:
    inputs = inputs_of([[log_w / 2, log_w / 2]], [advantage])
    output = run(name, inputs)
    output.loss.backward()
    assert output.loss.isfinite() and inputs.logprobs.grad.isfinite().all()
    assert all(math.isfinite(x) for x in means(output.metrics).values())
    if name == "vespo":
        assert inputs.logprobs.grad.abs().max() < 1e-14


@pytest.mark.parametrize("log_w", [30.0, 800.0])
def test_the_clamp_of_the_sum_keeps_a_kernel_without_decay_finite(log_w: float) -> None:
    grad = gradient("vespo", inputs_of([[log_w]], [1.0]), c_pos=(1.0, 0.0))  # phi = W
    assert float(grad) == pytest.approx(-math.exp(20), rel=1e-12)


def test_no_clamp_per_token() -> None:
    """25 - 12.25 - 12.25 leaves log W = 0.5; with each token clamped to +-20 it would be -4.5."""
    grad = gradient("vespo", inputs_of([[25.0, -12.25, -12.25]], [1.0]))
    assert float(grad[0]) == pytest.approx(-0.388227484, rel=1e-8)


def test_the_sign_is_not_read_from_a_masked_first_token() -> None:
    inputs = inputs_of([[0.0, 0.6]], [-1.0], masked={(0, 0)})
    assert float(gradient("vespo", inputs)[1]) == pytest.approx(1.169, abs=1e-3)  # the positive branch gives 0.282


def test_an_advantage_of_zero_takes_the_positive_branch() -> None:
    metrics = build_objective("vespo")(inputs_of([[0.5]], [0.0])).metrics
    assert [float(x) for x in metrics["phi_positive/mean"]] == pytest.approx([0.388227484, 1.0], rel=1e-8)


def test_w_is_not_normalised_by_length() -> None:
    short = gradient("vespo", inputs_of([[0.01] * 10], [1.0]))
    long = gradient("vespo", inputs_of([[0.01] * 100], [1.0]))
    assert float(short[0]) == pytest.approx(-0.890909209, rel=1e-8)  # log W = 0.1
    assert float(long[0]) == pytest.approx(-0.0426449898, rel=1e-8)  # log W = 1


@pytest.mark.parametrize("name", available_objectives())
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_what_a_masked_token_holds_does_not_matter(name: str, garbage: float, aggregation: str) -> None:
    masked = {(0, 1), (1, 0), (1, 1)}  # one token of the first response, all of the second
    rows = [[0.1, 0.0, -0.3], [0.0, 0.0], [0.4]]

    def outcome(value: float | None) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        inputs = inputs_of(rows, [1.0, -1.0, -2.0], masked=masked)
        if value is not None:
            for field in (inputs.logprobs, inputs.old_logprobs, inputs.rollout_logprobs):
                field.data[~inputs.mask] = value
            inputs.segment_ids[~inputs.mask] = 10**9 if value > 0 else -7
        output = run(name, inputs, aggregation=aggregation)
        output.loss.backward()
        return output.loss.detach(), inputs.logprobs.grad, means(output.metrics)

    (loss, grad, metrics), (clean_loss, clean_grad, clean_metrics) = outcome(garbage), outcome(None)
    assert torch.equal(loss, clean_loss) and torch.equal(grad, clean_grad) and metrics == clean_metrics
    assert (grad[[1, 3, 4]] == 0).all()
    if name in ("vespo", "sapo"):  # nothing is clipped
        assert (grad[[0, 2, 5]] != 0).all()


@pytest.mark.parametrize("name", available_objectives())
def test_a_nan_in_a_counted_token_is_not_hidden(name: str) -> None:
    inputs = inputs_of([[0.1, math.nan]], [1.0])
    assert run(name, inputs).loss.isnan()


@pytest.mark.parametrize("name", available_objectives())
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("rows", [[[0.1, 0.2], [0.3]], [[], []], []], ids=["all masked", "no token", "no response"])
def test_a_rank_with_nothing_to_count_adds_zero_with_a_gradient(
    name: str, rows: list[list[float]], aggregation: str
) -> None:
    inputs = inputs_of(rows, [1.0] * len(rows))
    inputs.mask[:] = False
    output = run(name, inputs, aggregation=aggregation)
    output.loss.backward()
    assert output.loss == 0 and (inputs.logprobs.grad == 0).all()
    assert all(float(value) == 0 and float(count) == 0 for value, count in output.metrics.values())


@pytest.mark.parametrize("name", available_objectives())
@pytest.mark.parametrize("aggregation", AGGREGATION_PARAMS)
def test_a_micro_batch_of_padding_alone_adds_zero_with_a_gradient(name: str, aggregation: str) -> None:
    """What a data-parallel rank packs that has run out of responses: two tokens, of none."""
    inputs = inputs_of([[0.1, 0.2]], [], masked={(0, 0), (0, 1)}, num_segments=0)
    output = run(name, inputs, aggregation=aggregation, **AGGREGATION_PARAMS[aggregation])
    output.loss.backward()
    assert output.loss == 0 and (inputs.logprobs.grad == 0).all()
    assert all(float(value) == 0 and float(count) == 0 for value, count in output.metrics.values())


def test_trainer_correction_ignores_the_engine() -> None:
    """log pi - log pi_old = 0.1, log pi_old - log mu = 0.4: W is e^0.5 as it is, e^0.1 without the mismatch."""
    for correction, phi in (("none", 0.388227484), ("trainer", 0.890909209)):
        inputs = inputs_of([[0.5]], [1.0])
        inputs.old_logprobs += 0.4
        assert float(gradient("vespo", inputs, correction=correction)[0]) == pytest.approx(-phi, rel=1e-8)


def test_grpo_without_dual_clip_follows_the_ratio() -> None:
    log_ratio = math.log(5.0)
    assert float(gradient("grpo", inputs_of([[log_ratio]], [-1.0]))[0]) == 0
    assert float(gradient("grpo", inputs_of([[log_ratio]], [-1.0]), dual_clip=None)[0]) == pytest.approx(5.0)


def test_clip_fractions_by_hand() -> None:
    """Ratios 5, 1.5, 1, 0.5 with A < 0: 0.5 is below the clip, 5 above the dual one; with A > 0 both above 1.28."""
    rows = [[math.log(r) for r in (5.0, 1.5, 1.0, 0.5)]]
    for advantage, clipped, dual in ((-1.0, 1, 1), (1.0, 2, 0), (0.0, 0, 0)):
        metrics = build_objective("grpo")(inputs_of(rows, [advantage])).metrics
        assert [float(x) for x in metrics["clip_fraction"]] == [clipped, 4]
        assert [float(x) for x in metrics["dual_clip_fraction"]] == [dual, 4]


@pytest.mark.parametrize(("advantage", "tau"), [(1.0, 1.0), (0.0, 1.05), (-1.0, 1.05)])
def test_sapo_gate_by_hand(advantage: float, tau: float) -> None:
    """4 p (1 - p) = 1 / cosh(tau (r - 1) / 2)^2, at r = 2."""
    metrics = build_objective("sapo")(inputs_of([[math.log(2.0)]], [advantage])).metrics
    assert float(metrics["gate/mean"][0]) == pytest.approx(1 / math.cosh(tau / 2) ** 2, rel=1e-12)


@pytest.mark.parametrize("name", available_objectives())
def test_on_policy_every_objective_is_the_policy_gradient(name: str) -> None:
    scale = 2e-3 if name == "oapl" else 1.0  # 2 beta: it is a regression
    grad = gradient(name, inputs_of([[0.0, 0.0], [0.0]], [0.5, -2.0])) / scale
    torch.testing.assert_close(grad, torch.tensor([-0.5, -0.5, 2.0], dtype=torch.float64))


def test_long_sums_of_float32_are_exact() -> None:
    """16k float32 differences that nearly cancel; a running float32 sum is off by ~1e-4 of log W."""
    torch.manual_seed(0)
    logprobs = -8 * torch.rand(16384)
    rollout = logprobs + 0.02 * torch.randn(16384)
    difference = logprobs.double() - rollout.double()
    sums = segment_sums([difference], torch.zeros(16384, dtype=torch.int64), 1)
    assert float(sums) == pytest.approx(math.fsum(difference.tolist()), abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_come_back_in_the_logprobs_dtype(dtype: torch.dtype) -> None:
    exact = inputs_of([[0.0, 0.0], [0.0]], [0.5, -2.0])
    inputs = inputs_of(
        [[0.0, 0.0], [0.0]],
        [0.5, -2.0],
        logprobs=exact.logprobs.detach().to(dtype).requires_grad_(),
        old_logprobs=exact.logprobs.detach().to(dtype),
        rollout_logprobs=exact.logprobs.detach().to(dtype),
    )
    grad = gradient("vespo", inputs)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, torch.tensor([-0.5, -0.5, 2.0], dtype=dtype))


def mean_reinforce(scale: float = 1.0):
    """An objective of one's own, for the dotted path."""
    return lambda ratios: (-scale * ratios.token_advantages() * ratios.logprobs, {})


def test_a_dotted_path_gives_an_objective_of_ones_own() -> None:
    grad = gradient(f"{__name__}.mean_reinforce", inputs_of([[0.3], [0.7]], [1.0, -2.0]), scale=3.0)
    assert grad.tolist() == [-3.0, 6.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vespoo", {}, "did you mean 'vespo'"),
        ("grpo", {"clip_hi": 0.3}, "clip_low=0.2, clip_high=0.28, dual_clip=3.0"),
        ("no.such.module", {}, "cannot import 'module' from 'no.such'"),
        ("math.pi", {}, "not a factory"),
        ("vespo", {"c_pos": (2.0,)}, "c_pos must be a pair"),
        ("vespo", {"c_neg": (-1.0, 2.0)}, "c_neg must be a pair"),
        ("grpo", {"dual_clip": 1.1}, "dual_clip must exceed"),
        ("gspo", {"clip_low": 2.0}, "clip_low must be in"),
        ("sapo", {"tau_neg": 0.0}, "must be positive"),
        ("vespo", {"aggregation": "token-men"}, "did you mean 'token-mean'"),
        ("vespo", {"aggregation": "constant"}, "give constant_length"),
        ("vespo", {"length_power": 2.0}, "length_power must be in"),
        ("respo", {"positive": (2.0, 1.0, 2.0)}, "0 < b < 1"),
        ("topr", {"negative": (1.0, 0.5)}, "0 <= low <= high"),
        ("cispo", {"high": 0.2}, "not to 1 -\\+ epsilon"),
        ("importance_sampling", {"level": "sentence"}, "token or sequence"),
        ("importance_sampling", {"cap": 0.0}, "cap must be positive"),
        ("bapo", {"low": (0.6, 1.2)}, "low within"),
        ("bapo", {"target": 1.0}, "target in"),
        ("m2po", {"threshold": 0.0}, "threshold must be positive"),
        ("dppo", {"divergence": "hellinger"}, "tv or kl"),
        ("oapl", {"beta": 0.0}, "beta must be positive"),
        ("vespo", {"correction": "trainr"}, "did you mean 'trainer'"),
        ("vespo", {"correction": "tis", "correction_params": {"cpa": 2.0}}, "level='token', cap=2.0"),
        ("vespo", {"correction": "tis", "correction_params": {"level": "word"}}, "one of token, sequence"),
        ("vespo", {"correction": "tis", "correction_params": {"cap": -1.0}}, "cap must be positive"),
        ("vespo", {"correction": "mis", "correction_params": {"low": 2.0, "high": 1.0}}, "0 <= low < high"),
        ("vespo", {"correction": "opsm", "correction_params": {"behaviour": "old"}}, "one of engine, trainer"),
        ("vespo", {"correction": "none", "correction_params": {"cap": 2.0}}, "parameters are: none"),
    ],
)
def test_bad_settings_name_the_mend(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(name, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(2)}, "mask must be a bool"),
        ({"old_logprobs": torch.zeros(3)}, "old_logprobs has shape"),
        ({"num_segments": 2}, "num_segments is 2"),
        ({"segment_ids": torch.zeros(2, dtype=torch.int32)}, "int64"),
        ({"logprobs": torch.zeros(1, 2)}, "one dimension"),
        ({"total_tokens": 0.0}, "must be positive"),
    ],
)
def test_bad_inputs_name_the_field(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inputs_of([[0.0, 0.0]], [1.0], **changes)
