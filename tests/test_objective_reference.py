"""Each objective x aggregation x correction against code for single responses, written from the papers' formulas.

The reference knows nothing of packing, masks by position, micro-batches, detached coefficients or histograms: it
differentiates the published objectives as they stand, in float64. Ours comes from three uneven micro-batches.
"""

import math

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

MICRO_BATCHES = [[8, 3], [0, 9, 2, 7], [6, 5, 4, 1]]


def ppo(r: torch.Tensor, adv: float, low: float, high: float, dual: float = math.inf) -> torch.Tensor:
    """What PPO maximises, case by case: a constant has no gradient."""
    if adv >= 0:
        return adv * torch.where(r <= high, r, high)
    return adv * torch.where(r < low, low, torch.where(r <= dual, r, dual))


def bapo_bounds(ratios: list[tuple[torch.Tensor, float]], params: dict) -> tuple[float, float]:
    """Algorithm 1 as it is printed, in the order that ``raise_first`` says."""
    c_low, low_end = params.get("low", (0.6, 0.9))
    c_high, high_end = params.get("high", (1.2, 3.0))
    while True:
        gain = sum(float((adv * r.clamp(max=c_high)).sum()) for r, adv in ratios if adv > 0)
        loss = sum(float((-adv * r.clamp(min=c_low)).sum()) for r, adv in ratios if adv < 0)
        if gain / (gain + loss) >= params.get("target", 0.4):
            return c_low, c_high
        may_raise = {"low": c_low + 0.02 <= low_end + 1e-9, "high": c_high + 0.05 <= high_end + 1e-9}
        first = params.get("raise_first", "high")
        which = first if may_raise[first] else {"low": "high", "high": "low"}[first]
        if not may_raise[which]:
            return c_low, c_high
        c_low, c_high = (c_low + 0.02, c_high) if which == "low" else (c_low, c_high + 0.05)


def m2po_largest(ratios: list[tuple[torch.Tensor, float]]) -> float:
    """Algorithm 1: the largest |log r| of a harmful token that stays, when the largest go one by one."""
    left = sorted(abs(math.log(x)) for r, adv in ratios for x in r.tolist() if adv * (x - 1) > 0)
    while sum(x * x for x in left) / len(left) > 0.04:
        left.pop()
    return left[-1]


def reference_token_losses(
    case: str, logp: torch.Tensor, behaviour: torch.Tensor, adv: float, all_ratios: list[tuple[torch.Tensor, float]]
) -> torch.Tensor:
    """Losses [t] of the counted tokens of one response; ``all_ratios``: r and A of every response of the mini-batch."""
    name, params = OBJECTIVE_CASES[case]
    r = torch.exp(logp - behaviour)
    fixed = r.detach()
    w = math.exp(sum((logp.detach() - behaviour).tolist()))
    tokens = len(logp)
    match name:
        case "vespo":
            c1, c2 = (2.0, 3.0) if adv >= 0 else (3.0, 2.0)
            w = w ** (1 / tokens ** params.get("length_power", 0.0))
            return -(w**c1) * math.exp(c2 * (1 - w)) * adv * logp
        case "respo":
            phi = (1 + w) / 2 * math.exp(1 - w) if adv >= 0 else math.sqrt(w) * math.exp(2 * (1 - math.sqrt(w)))
            return -phi * adv * logp
        case "topr":
            return -(1.0 if adv >= 0 else min(w, 1.0)) * adv * logp
        case "importance_sampling":
            weight = fixed if params.get("level") == "token" else torch.full_like(fixed, w)
            return -weight.clamp(max=params.get("cap", math.inf)) * adv * logp
        case "reinforce":
            return -adv * logp
        case "cispo":
            return -fixed.clamp(params.get("low", 0.0), params.get("high", 5.0)) * adv * logp
        case "oapl":
            # (beta log(pi / mu) - A)^2 / T for each token, differentiated through its own log-prob alone.
            own = logp - logp.detach() + math.log(w)
            loss = (1e-3 * own - adv) ** 2
            return loss.detach() / tokens + (loss - loss.detach())
        case "gspo" | "gspo_token":
            s = torch.exp((logp.detach() - behaviour).mean()) * torch.exp(logp - logp.detach())
            return -ppo(s, adv, 0.9997, 1.0004)
        case "sapo":
            tau = 1.0 if adv > 0 else 1.05
            return -adv * 4 / tau / (1 + torch.exp(-tau * (r - 1)))
        case "grpo":
            return -ppo(r, adv, 0.8, 1.28, 3.0)
        case "dapo":
            return -ppo(r, adv, 0.8, 1.28)
        case "dr_grpo":
            return -ppo(r, adv, 0.8, 1.2)
        case "bapo":
            return -ppo(r, adv, *bapo_bounds(all_ratios, params), 3.0)
        case "m2po":
            stays = (adv * (fixed - 1) <= 0) | (fixed.log().abs() <= m2po_largest(all_ratios) * (1 + 1e-12))
            return -torch.where(stays, r * adv, 0.0)
        case "dppo":
            p, q = logp.detach().exp(), behaviour.exp()
            if params.get("divergence") == "kl":
                too_far = q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p)) > 0.05
                dropped = too_far & ((p > q) if adv > 0 else (p < q))
            else:
                dropped = (p - q > 0.15) if adv > 0 else (q - p > 0.15)
            return torch.where(dropped, 0.0, -fixed.clamp(max=20.0) * adv * logp)
    raise AssertionError(f"no reference for {name}")


def reference_factors(
    correction_case: str, logp: torch.Tensor, old: torch.Tensor, mu: torch.Tensor, adv: float
) -> torch.Tensor:
    name, params = CORRECTION_CASES[correction_case]
    token_weights = torch.exp(old - mu)
    level = params.get("level", {"split": "sequence", "mis": "sequence"}.get(name, "token"))
    weights = token_weights if level == "token" else token_weights.prod().expand(len(old))
    match name:
        case "tis":
            return weights.clamp(max=params["cap"])
        case "split":
            return weights
        case "icepop" | "mis":
            return weights * (weights >= params["low"]) * (weights <= params["high"])
        case "geometric":
            mean = float(token_weights.log().mean().exp())
            return torch.full_like(old, float(params["low"] <= mean <= params["high"]))
        case "opsm":
            behaviour = old if params.get("behaviour") == "trainer" else mu
            masked = adv < 0 and float((behaviour - logp).mean()) > params["delta"]
            return torch.full_like(old, 0.0 if masked else 1.0)
    return torch.ones_like(old)


def sees_engine(correction_case: str) -> bool:
    name, params = CORRECTION_CASES[correction_case]
    return name == "none" or params.get("behaviour", "engine" if name == "opsm" else "trainer") == "engine"


def reference_sums(
    case: str, correction_case: str, responses: list[Response], leaf: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Which response -> its token losses, corrected and added; of those with a counted token."""
    counted = {i: r for i, r in enumerate(responses) if r.mask.any()}
    logps = {i: leaf[r.positions[r.mask]] for i, r in counted.items()}
    behaviours = {i: (r.rollout if sees_engine(correction_case) else r.old)[r.mask] for i, r in counted.items()}
    ratios = [((logps[i].detach() - behaviours[i]).exp(), r.advantage) for i, r in counted.items()]
    sums = {}
    for i, r in counted.items():
        losses = reference_token_losses(case, logps[i], behaviours[i], r.advantage, ratios)
        factors = reference_factors(correction_case, logps[i].detach(), r.old[r.mask], r.rollout[r.mask], r.advantage)
        sums[i] = (factors * losses).sum()
    return sums


def reference_scale(aggregation: str, response: Response, responses: list[Response]) -> float:
    """What the sum of a response's token losses is multiplied by."""
    return {
        "token-mean": 1 / sum(int(r.mask.sum()) for r in responses),
        "seq-mean-token-sum": 1 / len(responses),
        "seq-mean-token-mean": 1 / max(int(response.mask.sum()), 1) / len(responses),
        "constant": 1 / (96 * len(responses)),
    }[aggregation]


def reference_loss(
    case: str, aggregation: str, correction_case: str, responses: list[Response], leaf: torch.Tensor
) -> torch.Tensor:
    sums = reference_sums(case, correction_case, responses, leaf)
    return torch.stack([reference_scale(aggregation, responses[i], responses) * s for i, s in sums.items()]).sum()


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
