"""The mismatch budget: how much of its signal a sequence-level objective keeps under a per-token mismatch.

If the log-ratios of tokens were independent and normal with E[r] = 1, their variance would be twice k3 = KL(mu || pi)
a token, and a response of T tokens would have

    log W ~ N(-k3 T, 2 k3 T).

Three numbers say what an objective with coefficient phi makes of it, for each sign of the advantage: E[phi]; the
effective sample size (E phi)^2 / E phi^2; and the share of responses that are dead, phi < 0.01. Real mismatch has
heavier tails and is correlated along a response: ``resample_log_w`` keeps the tails of a run's own tokens, and
``measure`` takes log W as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from megatron_vespo.objectives.build import build_objective
from megatron_vespo.objectives.kernel import SearchingKernel
from megatron_vespo.objectives.ratios import Ratios

DEAD = 0.01
"""A response whose coefficient is below this share of the on-policy one teaches next to nothing."""

Phi = Callable[[torch.Tensor], torch.Tensor]
"""log W [n] float64 -> coefficient on grad log pi over what it is on policy, [n]: phi(W), where phi(1) = 1."""


@dataclass(frozen=True, slots=True)
class Budget:
    mean_phi: float
    ess: float
    """Over the number of responses, in (0, 1]."""
    dead: float
    """Share of responses with phi < DEAD."""


def predict(phi: Phi, k3: float, length: float) -> Budget:
    """Under the normal model; ``k3`` in nats a token, ``length`` in tokens. Raises ValueError where one is negative."""
    if not (k3 >= 0 and length > 0):
        raise ValueError(f"k3 must be >= 0 nats a token and length > 0 tokens, got k3={k3}, length={length}")
    spread = math.sqrt(2 * k3 * length)
    # The trapezoidal rule: exponentially accurate where phi is smooth, and unlike Gauss-Hermite quadrature not misled
    # by a clip or by the edge of the dead. The largest integrand, W^2, has its mass at z = 2 spread.
    reach = 10 + 2 * spread
    z = torch.linspace(-reach, reach, 40_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2)
    return _summarize(phi(spread * z - k3 * length), density / density.sum())


def measure(phi: Phi, log_w: torch.Tensor) -> Budget:
    """Of responses' own ``log_w`` [n]."""
    log_w = log_w.to(torch.float64)
    return _summarize(phi(log_w), torch.full_like(log_w, 1 / len(log_w)))


def interval(
    phi: Phi, log_w: torch.Tensor, *, level: float = 0.9, resamples: int = 1000, seed: int = 0
) -> tuple[Budget, Budget]:
    """(lower, upper) ends of the bootstrap interval of ``measure``: responses resampled with replacement."""
    generator = torch.Generator().manual_seed(seed)
    values, n = phi(log_w.to(torch.float64)), len(log_w)
    uniform = torch.full_like(values, 1 / n)
    draws = (values[torch.randint(n, (n,), generator=generator)] for _ in range(resamples))
    found = torch.tensor([astuple(_summarize(drawn, uniform)) for drawn in draws], dtype=torch.float64)
    lower, upper = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64), dim=0).tolist()
    return Budget(*lower), Budget(*upper)


def resample_log_w(differences: torch.Tensor, length: int, *, responses: int = 4000, seed: int = 0) -> torch.Tensor:
    """[responses] log W of ``length`` tokens each, drawn with replacement from the per-token ``differences`` [n].

    ``differences``: log-prob of the policy minus that of the behaviour policy, of a run's own sampled tokens. Their
    mean and their tails are kept; their order along a response is not.
    """
    generator = torch.Generator().manual_seed(seed)
    differences = differences.to(torch.float64)
    sums = [
        differences[torch.randint(len(differences), (length,), generator=generator)].sum() for _ in range(responses)
    ]
    return torch.stack(sums)


def objective_phi(name: str, length: float, *, positive: bool, **params: Any) -> Phi:
    """The coefficient of objective ``name`` for a response of ``length`` tokens and A = 1 or -1.

    Read off the gradient of the objective itself, so that it holds for one's own (dotted path), too. Raises ValueError
    for an objective whose coefficient is not a function of log W and the length: one that weighs tokens by their own
    ratios, or that searches a threshold over the mini-batch.
    """
    kernel = build_objective(name, **params).kernel
    if isinstance(kernel, SearchingKernel):
        raise ValueError(f"objective {name!r} searches its threshold over a mini-batch: it has no phi(W) of its own")

    def coefficient(log_w: torch.Tensor, token_log_ratio: float = 0.0) -> torch.Tensor:
        # One token stands for each response: of a sequence-level objective all have the same coefficient.
        logprobs = torch.zeros_like(log_w, requires_grad=True)
        advantages = torch.full_like(log_w, 1.0 if positive else -1.0)
        zeros = torch.zeros_like(log_w)
        token_loss, _ = kernel(
            Ratios(
                logprobs=logprobs,
                log_ratio=logprobs + token_log_ratio,
                log_stale=zeros,
                log_engine=zeros,
                mask=torch.ones_like(log_w, dtype=torch.bool),
                segment_ids=torch.arange(len(log_w)),
                advantages=advantages,
                lengths=torch.full_like(log_w, length),
                log_w=log_w,
                log_w_stale=log_w,
                log_w_engine=zeros,
                owns_sequences=True,
            )
        )
        (grad,) = torch.autograd.grad(token_loss.sum(), logprobs)
        return -grad / advantages

    probe = torch.linspace(-1, 1, 21, dtype=torch.float64)
    if any(not torch.equal(coefficient(probe, ratio), coefficient(probe)) for ratio in (-0.5, 0.5)):
        raise ValueError(
            f"objective {name!r} weighs each token by its own ratio: how it copes with a mismatch does not depend on "
            "the length of a response, and there is no phi(W) to predict"
        )
    on_policy = coefficient(torch.zeros(1, dtype=torch.float64))
    return lambda log_w: coefficient(log_w) / on_policy


def budget_table(name: str, k3: float, lengths: Sequence[float], **params: Any) -> str:
    """What ``megatron-vespo budget`` prints: the prediction for responses of each length, for A >= 0 and A < 0."""
    lines = [f"{name} under a mismatch of k3 = {k3:g} nats a token, independent and normal", *table_head("tokens", 8)]
    for length in lengths:
        both = [predict(objective_phi(name, length, positive=sign, **params), k3, length) for sign in (True, False)]
        log_w = f"{-k3 * length:.3g} ± {math.sqrt(2 * k3 * length):.3g}"
        lines.append(f"{length:8g}{log_w:>18}{table_cells(*both)}")
    return "\n".join(lines)


def table_head(first: str, width: int) -> tuple[str, str]:
    """The two lines above a table whose first column is ``first``, of ``width`` characters."""
    return (
        f"{first:>{width}}{'log W':>18}{'E phi':>16}{'ESS':>16}{f'phi < {DEAD}':>18}",
        f"{'':{width}}{'mean ± s.d.':>18}" + f"{'A >= 0':>9}{'A < 0':>7}" * 2 + f"{'A >= 0':>11}{'A < 0':>7}",
    )


def table_cells(positive: Budget, negative: Budget) -> str:
    """The columns below the last six words of :func:`table_head`."""
    pairs = [f"{getattr(positive, name):9.3f}{getattr(negative, name):7.3f}" for name in ("mean_phi", "ess")]
    return f"{''.join(pairs)}{positive.dead:11.1%}{negative.dead:7.1%}"


def _summarize(phi: torch.Tensor, probability: torch.Tensor) -> Budget:
    mean = float((phi * probability).sum())
    square = float((phi * phi * probability).sum())
    return Budget(mean, mean * mean / square if square else 0.0, float(probability[phi < DEAD].sum()))
