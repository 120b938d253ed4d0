"""Each objective x aggregation x correction against loops over single sequences, written from the papers' formulas.

The reference knows nothing of packing, masks by position, detached coefficients or kernels: it differentiates the
published objectives as they stand (GSPO through its sequence ratio), in float64.
"""

import math

import pytest
import torch
from objective_data import AGGREGATION_PARAMS, OBJECTIVE_NAMES, Response, make_responses, pack

from megatron_vespo.objectives import build_objective, summarize_metrics


def reference_token_losses(name: str, logp: torch.Tensor, behaviour: torch.Tensor, adv: float) -> list[torch.Tensor]:
    """Losses of the counted tokens of one response; logp and behaviour [t] hold nothing else."""
    if name == "vespo":
        log_w = sum(float(a) - float(b) for a, b in zip(logp.detach(), behaviour, strict=True))
        c1, c2 = (2.0, 3.0) if adv >= 0 else (3.0, 2.0)
        phi = math.exp(log_w) ** c1 * math.exp(c2 * (1 - math.exp(log_w)))
        return [-phi * adv * lp for lp in logp]
    if name == "gspo":
        ratio = torch.exp((logp - behaviour).mean())
        if adv >= 0:
            objective = adv * (ratio if ratio <= 1.0004 else ratio.detach() * 0 + 1.0004)
        else:
            objective = adv * (ratio if ratio >= 0.9997 else ratio.detach() * 0 + 0.9997)
        return [-objective for _ in logp]
    losses = []
    for lp, mu in zip(logp, behaviour, strict=True):
        r = torch.exp(lp - mu)
        if name == "sapo":
            tau = 1.0 if adv > 0 else 1.05
            losses.append(-adv * 4 / tau / (1 + torch.exp(-tau * (r - 1))))
        elif adv >= 0:
            losses.append(-adv * (r if r <= 1.28 else 1.28 + 0 * r.detach()))
        elif r < 0.8:
            losses.append(-adv * 0.8 + 0 * r.detach())
        else:
            losses.append(-adv * (r if r <= 3 else 3.0 + 0 * r.detach()))
    return losses


def reference_loss(
    name: str, aggregation: str, correction: str, responses: list[Response], leaf: torch.Tensor
) -> torch.Tensor:
    total_tokens = sum(int(r.mask.sum()) for r in responses)
    loss = torch.zeros((), dtype=torch.float64)
    for r in responses:
        if not r.mask.any():
            continue
        behaviour = (r.rollout if correction == "none" else r.old)[r.mask]
        token_sum = sum(reference_token_losses(name, leaf[r.positions[r.mask]], behaviour, r.advantage))
        scale = {
            "token-mean": 1 / total_tokens,
            "seq-mean-token-sum": 1 / len(responses),
            "seq-mean-token-mean": 1 / len(behaviour) / len(responses),
            "constant": 1 / (96 * len(responses)),
        }[aggregation]
        loss = loss + scale * token_sum
    return loss


@pytest.mark.parametrize("correction", ["none", "trainer"])
@pytest.mark.parametrize("aggregation", AGGREGATION_PARAMS)
@pytest.mark.parametrize("name", OBJECTIVE_NAMES)
def test_loss_and_gradient_equal_the_reference(name: str, aggregation: str, correction: str) -> None:
    responses, leaf = make_responses(seed=1)
    ours, theirs = leaf.clone().requires_grad_(), leaf.clone().requires_grad_()
    objective = build_objective(name, aggregation=aggregation, correction=correction, **AGGREGATION_PARAMS[aggregation])
    loss = objective(pack(responses, responses, ours)).loss
    expected = reference_loss(name, aggregation, correction, responses, theirs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-14)
    assert theirs.grad is not None and theirs.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_the_cases_lie_on_both_sides_of_the_clips(name: str) -> None:
    responses, leaf = make_responses(seed=1)
    for positive in (True, False):
        chosen = [r for r in responses if (r.advantage > 0) == positive]
        metrics = summarize_metrics(build_objective(name)(pack(chosen, chosen, leaf)).metrics)
        assert 0 < metrics["clip_fraction"] < 1
        if name == "grpo" and not positive:
            assert 0 < metrics["dual_clip_fraction"] < 1


def test_metrics_equal_the_reference() -> None:
    responses, leaf = make_responses(seed=2)
    metrics = summarize_metrics(build_objective("vespo")(pack(responses, responses, leaf)).metrics)

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
    metrics = summarize_metrics(build_objective("vespo")(pack(positive, positive, leaf)).metrics)
    assert "phi_positive/mean" in metrics and "phi_negative/mean" not in metrics
