"""The mismatch budget against published tables, closed forms and samples."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vespo.cli import main
from megatron_vespo.objectives.budget import interval, measure, objective_phi, predict, resample_log_w

LENGTH = 1000

# s.d. of log W: E phi+, E phi-, ESS phi+, ESS phi-, ESS of raw IS, of IS truncated at 2, E phi of ReSPO+ and ReSPO-;
# a Monte-Carlo of 4 million samples made independently of this code.
MONTE_CARLO = {
    0.1: (0.995, 0.990, 0.990, 0.990, 0.990, 0.990, 1.000, 1.001),
    0.5: (0.902, 0.795, 0.886, 0.843, 0.779, 0.824, 1.006, 1.027),
    1.0: (0.705, 0.505, 0.753, 0.581, 0.367, 0.633, 1.048, 1.069),
    2.0: (0.339, 0.199, 0.411, 0.241, 0.019, 0.330, 1.182, 0.970),
    3.0: (0.134, 0.073, 0.171, 0.090, 0.000, 0.140, 1.282, 0.632),
    4.0: (0.044, 0.023, 0.057, 0.029, 0.000, 0.048, 1.332, 0.301),
}


@pytest.mark.parametrize("spread", MONTE_CARLO)
def test_predictions_equal_an_independent_monte_carlo(spread: float) -> None:
    k3 = spread**2 / 2 / LENGTH
    vespo, respo = (
        [predict(objective_phi(name, LENGTH, positive=sign), k3, LENGTH) for sign in (True, False)]
        for name in ("vespo", "respo")
    )
    raw, truncated = (
        predict(objective_phi("importance_sampling", LENGTH, positive=True, **params), k3, LENGTH)
        for params in ({}, {"cap": 2.0})
    )
    found = (
        [x.mean_phi for x in vespo] + [x.ess for x in vespo] + [raw.ess, truncated.ess] + [x.mean_phi for x in respo]
    )
    assert found == pytest.approx(MONTE_CARLO[spread], abs=1.6e-3)


@pytest.mark.parametrize(
    ("k3", "length", "mean_phi", "dead"),
    [(1e-5, 16_000, 0.88, 0.008), (1e-4, 2000, 0.86, 0.01), (1e-4, 16_000, 0.40, 0.17), (1e-3, 8000, 0.04, 0.87)],
)
def test_how_much_vespo_keeps_at_a_k3(k3: float, length: int, mean_phi: float, dead: float) -> None:
    budget = predict(objective_phi("vespo", length, positive=True), k3, length)
    assert budget.mean_phi == pytest.approx(mean_phi, abs=0.006)
    assert budget.dead == pytest.approx(dead, abs=0.006)


@pytest.mark.parametrize("spread", [0.3, 1.5, 4.0])
def test_closed_forms(spread: float) -> None:
    """E W = 1, ESS = exp(-s^2); E min(W, 1) and P(W < DEAD) by the normal distribution."""
    k3 = spread**2 / 2 / LENGTH

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    raw = predict(torch.exp, k3, LENGTH)
    assert (raw.mean_phi, raw.ess) == pytest.approx((1, math.exp(-(spread**2))), rel=1e-9)
    assert raw.dead == pytest.approx(normal((math.log(0.01) + spread**2 / 2) / spread), abs=3e-4)
    capped = predict(lambda log_w: log_w.exp().clamp(max=1), k3, LENGTH)
    assert capped.mean_phi == pytest.approx(2 * normal(-spread / 2), abs=1e-6)


def test_an_objective_is_held_against_what_it_does_on_policy() -> None:
    for name in ("vespo", "respo", "topr", "gspo", "oapl", "reinforce", "importance_sampling"):
        for positive in (True, False):
            phi = objective_phi(name, LENGTH, positive=positive)
            assert phi(torch.zeros(1, dtype=torch.float64)).item() == 1


def test_the_length_enters_where_an_objective_normalises_by_it() -> None:
    log_w = torch.tensor([-2.0], dtype=torch.float64)
    sum_form = objective_phi("vespo", 400, positive=True)(log_w / 20)
    assert objective_phi("vespo", 400, positive=True, length_power=0.5)(log_w) == pytest.approx(sum_form)


@pytest.mark.parametrize("name", ["grpo", "sapo", "m2po"])
def test_an_objective_without_a_phi_of_w_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        objective_phi(name, LENGTH, positive=True)


def test_resampled_tokens_and_measured_responses_agree_with_the_prediction() -> None:
    k3, length = 5e-4, 2000
    generator = torch.Generator().manual_seed(2)
    differences = math.sqrt(2 * k3) * torch.randn(200_000, generator=generator, dtype=torch.float64) - k3
    phi = objective_phi("vespo", length, positive=True)
    expected = predict(phi, k3, length)
    log_w = resample_log_w(differences, length)
    found, (lower, upper) = measure(phi, log_w), interval(phi, log_w, resamples=200)
    for field in ("mean_phi", "ess", "dead"):
        low, value, high = (getattr(x, field) for x in (lower, found, upper))
        assert low < value < high
        assert abs(value - getattr(expected, field)) < 1.5 * (high - low)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--k3", "1e-4", "--length", "2048", "16384"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:5] == ["16384", "-1.64", "±", "1.81", "0.396"]
    assert row[8] == "17.8%"
    assert main(["budget", "--k3", "1e-4", "--length", "100", "--objective", "vespa"]) == 2
    assert "did you mean 'vespo'" in capsys.readouterr().err
    assert main(["budget", "--k3=-1", "--length", "100"]) == 2
    assert (
        main(["budget", "--k3", "0.1", "--length", "9", "--objective", "importance_sampling", "--params", "cap=2"]) == 0
    )
