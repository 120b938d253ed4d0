"""Each objective x aggregation x correction against the formulas of objective_formulas.py, differentiated in float64.

Ours comes from three uneven micro-batches.
"""

import pytest
import torch
from objective_data import (
    AGGREGATION_PARAMS,
    CORRECTION_CASES,
    OBJECTIVE_CASES,
    Response,
    build_case,
    make_responses,
    means,
    pack,
    ready,
)
from objective_formulas import reference_scale, reference_sums

MICRO_BATCHES = [[8, 3], [0, 9, 2, 7], [6, 5, 4, 1]]


@pytest.mark.parametrize("correction_case", CORRECTION_CASES)
@pytest.mark.parametrize("case", OBJECTIVE_CASES)
def test_loss_and_gradient_equal_the_reference(case: str, correction_case: str) -> None:
    responses, leaf = make_responses(seed=1)
    theirs = leaf.clone().requires_grad_()
    # A response's sum depends on its own log-probs alone: one backward serves every way to weigh the sums.
    sums = reference_sums(case, correction_case, responses, theirs)
    torch.stack(list(sums.values())).sum().backward()
    assert theirs.grad is not None
    for aggregation in AGGREGATION_PARAMS:
        ours = leaf.clone().requires_grad_()
        micro_batches = [pack([responses[i] for i in indices], responses, ours) for indices in MICRO_BATCHES]
        objective = ready(build_case(case, aggregation, correction_case), micro_batches)
        loss = torch.stack([objective(inputs).loss for inputs in micro_batches]).sum()
        loss.backward()
        scales = [reference_scale(aggregation, r, responses) for r in responses]
        expected = sum(scales[i] * s.detach() for i, s in sums.items())
        per_token = torch.cat(
            [torch.full((len(r.positions),), x, dtype=torch.float64) for r, x in zip(responses, scales, strict=True)]
        )
        assert ours.grad is not None
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(ours.grad, per_token * theirs.grad, rtol=1e-11, atol=1e-14)
        assert theirs.grad.abs().max() > 1e-4


CLIPPING = [
    "grpo", "dapo", "dr_grpo", "gspo", "bapo, target met", "bapo, authors' order", "m2po", "dppo", "dppo, kl",
    "cispo, tight", "importance_sampling, capped", "importance_sampling, token capped",
]  # fmt: skip


@pytest.mark.parametrize("case", CLIPPING)
def test_the_cases_lie_on_both_sides_of_the_clips(case: str) -> None:
    responses, leaf = make_responses(seed=1)
    inputs = [pack([r for r in responses if (r.advantage > 0) == sign], responses, leaf) for sign in (True, False)]
    objective = ready(build_case(case), inputs)
    for one_sign in inputs:
        assert 0 < means(objective(one_sign).metrics)["clip_fraction"] < 1
    metrics = means(objective(inputs[1]).metrics)
    assert 0 < metrics.get("dual_clip_fraction", 0.5) < 1


@pytest.mark.parametrize("case", ["bapo, target met", "bapo, authors' order"])
def test_the_search_of_bapo_ends_between_its_ends(case: str) -> None:
    responses, leaf = make_responses(seed=1)
    inputs = pack(responses, responses, leaf)
    metrics = means(ready(build_case(case), [inputs])(inputs).metrics)
    assert 1.25 < metrics["clip_high"] < 1.95


@pytest.mark.parametrize("correction_case", [c for c in CORRECTION_CASES if c not in ("none", "trainer")])
def test_the_cases_lie_on_both_sides_of_the_corrections(correction_case: str) -> None:
    responses, leaf = make_responses(seed=1)
    metrics = means(build_case("vespo", correction_case=correction_case)(pack(responses, responses, leaf)).metrics)
    if correction_case.startswith(("split", "tis")):
        assert metrics["correction/std"] > 0.01 and metrics["correction_kept"] == 1
    else:
        assert 0 < metrics["correction_kept"] < 1


def test_metrics_equal_the_reference() -> None:
    responses, leaf = make_responses(seed=2)
    metrics = means(build_case("vespo")(pack(responses, responses, leaf)).metrics)

    def log_ws(minuend: str, subtrahend: str) -> torch.Tensor:
        def of(r: Response, field: str) -> torch.Tensor:
            return (leaf[r.positions] if field == "pi" else getattr(r, field))[r.mask]

        return torch.stack([(of(r, minuend) - of(r, subtrahend)).sum() for r in responses if r.mask.any()])

    counted = [r for r in responses if r.mask.any()]
    log_w = log_ws("pi", "rollout")
    w = log_w.exp()
    positive = torch.tensor([r.advantage >= 0 for r in counted])
    phi = torch.where(positive, w**2 * torch.exp(3 * (1 - w)), w**3 * torch.exp(2 * (1 - w)))
    engine = torch.cat([(r.old - r.rollout)[r.mask] for r in counted])
    stale = torch.cat([(leaf[r.positions] - r.old)[r.mask] for r in counted])
    expected = {
        "w/mean": w.mean(),
        "w/ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "log_w/mean": log_w.mean(),
        "log_w/std": log_w.std(unbiased=False),
        "log_w_stale/mean": log_ws("pi", "old").mean(),
        "log_w_stale/mean_square": (log_ws("pi", "old") ** 2).mean(),
        "log_w_engine/mean": log_ws("old", "rollout").mean(),
        "log_w_engine/mean_square": (log_ws("old", "rollout") ** 2).mean(),
        "phi/mean": phi.mean(),
        "phi/ess": phi.sum() ** 2 / (len(phi) * (phi**2).sum()),
        "phi_positive/mean": phi[positive].mean(),
        "phi_negative/mean": phi[~positive].mean(),
        "rollout_logprob_diff": engine.abs().mean(),
        "k3_engine": (engine.exp() - 1 - engine).mean(),
        "k3_stale": (stale.exp() - 1 - stale).mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-9), name


def test_a_sign_that_does_not_occur_has_no_mean() -> None:
    responses, leaf = make_responses()
    positive = [r for r in responses if r.advantage > 0]
    metrics = means(build_case("vespo")(pack(positive, positive, leaf)).metrics)
    assert "phi_positive/mean" in metrics and "phi_negative/mean" not in metrics
