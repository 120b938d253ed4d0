"""What is done about a kernel that the engine's noise shrinks: ends and limits where the result is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from objective_data import inputs_of, means, ready

from megatron_vespo.objectives import ObjectiveInputs, build_objective

ROWS = [[0.3, -0.9, 0.2], [0.8], [-1.4, 0.1], [0.05, 0.05, -0.6, 0.1]]
ADVANTAGES = [1.0, -0.7, 0.4, -1.2]


def stale_and_noisy() -> ObjectiveInputs:
    """Log W of ROWS, of which the engine has a part of its own on each token."""
    inputs = inputs_of(ROWS, ADVANTAGES)
    noise = torch.linspace(-0.5, 0.6, len(inputs.mask), dtype=torch.float64)
    return dataclasses.replace(inputs, old_logprobs=inputs.rollout_logprobs + noise)


def gradient(name: str, correction: str = "none", **params: float) -> list[float]:
    inputs = stale_and_noisy()
    logprobs = inputs.logprobs.detach().requires_grad_()
    inputs = dataclasses.replace(inputs, logprobs=logprobs)
    ready(build_objective(name, correction=correction, **params), [inputs])(inputs).loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad.tolist()


def test_without_a_bound_on_the_noise_tempered_is_vespo_and_at_none_the_engine_is_out_of_w() -> None:
    assert gradient("vespo_tempered", noise=math.inf) == pytest.approx(gradient("vespo"), rel=1e-12)
    assert gradient("vespo_tempered", noise=0.0) == pytest.approx(gradient("vespo", "trainer"), rel=1e-12)
    assert gradient("vespo_tempered") != pytest.approx(gradient("vespo"), rel=1e-3)
    assert gradient("vespo_tempered", "trainer") == pytest.approx(gradient("vespo", "trainer"), rel=1e-12)


def test_long_responses_are_tempered_more() -> None:
    """sigma^2 = (3 + 1) * 1 / 4 of two responses with log W_engine sqrt(3) and 1: k = 0.5 / sqrt(T)."""
    inputs = inputs_of([[math.sqrt(3) / 3] * 3, [1.0]], [1.0, 1.0])
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.logprobs.detach())
    metrics = means(ready(build_objective("vespo_tempered", noise=0.5), [inputs])(inputs).metrics)
    assert metrics["tempering"] == pytest.approx((0.5 / math.sqrt(3) + 0.5) / 2, rel=1e-12)


def test_renormalised_weights_have_mean_1_for_each_sign() -> None:
    inputs = stale_and_noisy()
    metrics = means(ready(build_objective("vespo_renormalised"), [inputs])(inputs).metrics)
    assert metrics["phi_positive/mean"] == pytest.approx(1.0, rel=1e-12)
    assert metrics["phi_negative/mean"] == pytest.approx(1.0, rel=1e-12)
    assert means(build_objective("vespo")(inputs).metrics)["phi_positive/mean"] < 0.95


def test_a_mini_batch_without_weight_is_given_back_no_more_than_the_limit() -> None:
    inputs = inputs_of([[-9.0], [-9.5]], [1.0, 1.0])
    ours = means(ready(build_objective("vespo_renormalised", limit=3.0), [inputs])(inputs).metrics)
    plain = means(build_objective("vespo")(inputs).metrics)
    assert ours["phi/mean"] == pytest.approx(3 * plain["phi/mean"], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("vespo_renormalised", {"limit": 0.5}, "limit must be at least 1"),
        ("vespo_tempered", {"noise": -1.0}, "noise must be at least 0"),
        ("vespo_tempered", {"c_pos": (1.0,)}, "c_pos must be a pair"),
    ],
)
def test_what_they_cannot_use_is_refused(name: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(name, **params)
