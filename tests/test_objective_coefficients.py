"""The coefficient of each token and response, against the formulas of the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_data import OBJECTIVE_CASES, build_case, inputs_of, make_responses, pack, ready

from megatron_vespo.objectives.coefficients import response_weights, token_coefficients

LOG_RATIOS = [[0.3, -0.1, 0.4], [-0.9, 0.05], [0.2]]
ADVANTAGES = [1.5, -0.5, 0.0]


def test_vespo_weighs_every_token_of_a_response_by_phi() -> None:
    inputs = inputs_of(LOG_RATIOS, ADVANTAGES, masked={(0, 1)})
    found = token_coefficients(build_case("vespo"), inputs).tolist()
    w = math.exp(0.3 + 0.4), math.exp(-0.9 + 0.05)
    expected = [w[0] ** 2 * math.exp(3 * (1 - w[0])), w[1] ** 3 * math.exp(2 * (1 - w[1]))]
    assert found[:5] == pytest.approx([expected[0], 0.0, expected[0], expected[1], expected[1]])
    assert math.isnan(found[5])  # A = 0


def test_grpo_weighs_a_token_by_its_ratio_or_not_at_all() -> None:
    found = token_coefficients(build_case("grpo"), inputs_of(LOG_RATIOS, ADVANTAGES)).tolist()
    assert found[:5] == pytest.approx([0.0, math.exp(-0.1), 0.0, 0.0, math.exp(0.05)])


@pytest.mark.parametrize("case", OBJECTIVE_CASES)
def test_coefficients_are_the_gradient_of_the_loss(case: str) -> None:
    responses, leaf = make_responses(seed=4)
    leaf.requires_grad_()
    inputs = pack(responses, responses, leaf)
    objective = ready(build_case(case, "token-mean", "tis"), [inputs])
    objective(inputs).loss.backward()
    assert leaf.grad is not None
    coefficients = token_coefficients(objective, inputs)
    segments = torch.where(inputs.mask, inputs.segment_ids, 0)
    expected = -coefficients * inputs.advantages[segments] / inputs.total_tokens
    torch.testing.assert_close(leaf.grad, torch.where(coefficients.isnan(), 0.0, expected), rtol=1e-10, atol=1e-15)


def test_phi_is_split_into_what_staleness_and_what_the_engine_does() -> None:
    inputs = inputs_of(LOG_RATIOS, [1.0, -1.0, 1.0])
    stale = [[0.1, 0.1, 0.1], [-0.2, 0.0], [0.5]]
    flat = torch.tensor([x for row in stale for x in row], dtype=torch.float64)
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach() - flat)
    found = response_weights(build_case("vespo"), inputs)
    w_stale, w = (torch.tensor([sum(row) for row in rows]).double().exp() for rows in (stale, LOG_RATIOS))

    def phi(w: torch.Tensor) -> torch.Tensor:
        c1, c2 = torch.tensor([2.0, 3.0, 2.0]), torch.tensor([3.0, 2.0, 3.0])
        return w**c1 * torch.exp(c2 * (1 - w))

    torch.testing.assert_close(found.log_w_stale, w_stale.log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.log_w_engine, (w / w_stale).log(), rtol=1e-6, atol=1e-7)
    for ours, theirs in ((found.phi, w), (found.phi_stale, w_stale), (found.phi_engine, w / w_stale)):
        torch.testing.assert_close(ours, phi(theirs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", OBJECTIVE_CASES)
def test_on_policy_every_phi_is_one(case: str) -> None:
    inputs = inputs_of([[0.0, 0.0], [0.0]], [1.0, -1.0])
    probe = inputs_of(LOG_RATIOS, [1.0, -1.0, 1.0])  # bounds are searched on something that has a spread
    found = response_weights(ready(build_case(case), [probe]), inputs)
    assert found.phi.tolist() == pytest.approx([1.0, 1.0])
