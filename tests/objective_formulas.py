"""The published objectives and corrections for single responses, in plain loops, written from the papers' formulas.

They know nothing of packing, masks by position, micro-batches, detached coefficients or histograms.
"""

from __future__ import annotations

import math

import torch
from objective_data import CORRECTION_CASES, OBJECTIVE_CASES, Response


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


def vespo_phi(w: float, adv: float) -> float:
    c1, c2 = (2.0, 3.0) if adv >= 0 else (3.0, 2.0)
    return w**c1 * math.exp(c2 * (1 - w))


def mean_phi(ratios: list[tuple[torch.Tensor, float]], sign: bool) -> float:
    found = [vespo_phi(float(r.prod()), adv) for r, adv in ratios if (adv >= 0) == sign]
    return sum(found) / len(found)


def tempering(noise: float, tokens: int, engines: list[tuple[float, int]]) -> float:
    """What the engine's part of a response's log W is scaled by; ``engines``: log W_engine and T of every response."""
    sigma = math.sqrt(sum(log_w * log_w for log_w, _ in engines) / sum(t for _, t in engines))
    return min(1.0, noise / (sigma * math.sqrt(tokens)))


def reference_token_losses(
    case: str,
    logp: torch.Tensor,
    behaviour: torch.Tensor,
    adv: float,
    all_ratios: list[tuple[torch.Tensor, float]],
    engine: float,
    engines: list[tuple[float, int]],
) -> torch.Tensor:
    """Losses [t] of the counted tokens of one response. ``all_ratios``: r and A of every response of the mini-batch;
    ``engine``: the part of this one's log W that is the engine's; ``engines``: log W_engine and T of every response."""
    name, params = OBJECTIVE_CASES[case]
    r = torch.exp(logp - behaviour)
    fixed = r.detach()
    w = math.exp(sum((logp.detach() - behaviour).tolist()))
    tokens = len(logp)
    match name:
        case "vespo":
            w = w ** (1 / tokens ** params.get("length_power", 0.0))
            return -vespo_phi(w, adv) * adv * logp
        case "vespo_renormalised":
            factor = min(1 / mean_phi(all_ratios, adv >= 0), params.get("limit", 10.0))
            return -vespo_phi(w, adv) * factor * adv * logp
        case "vespo_tempered":
            kept = tempering(params.get("noise", 0.25), tokens, engines)
            return -vespo_phi(w * math.exp((kept - 1) * engine), adv) * adv * logp
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
    engines = {i: (float((r.old - r.rollout)[r.mask].sum()), int(r.mask.sum())) for i, r in counted.items()}
    sums = {}
    for i, r in counted.items():
        engine = engines[i][0] if sees_engine(correction_case) else 0.0
        whole = ratios, engine, list(engines.values())
        losses = reference_token_losses(case, logps[i], behaviours[i], r.advantage, *whole)
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
