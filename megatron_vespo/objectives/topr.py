"""TOPR: tapered off-policy REINFORCE (arXiv 2503.14286)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import coefficient_metrics
from megatron_vespo.objectives.ratios import Ratios, bounded_exp


@dataclass(frozen=True, slots=True)
class Topr:
    """l_t = -sg[clip(W, low, high)] A log pi_t,    (low, high) = ``positive`` where A >= 0, ``negative`` where A < 0.

    Source: the paper's canonical rule. Positive responses weigh 1, wherever the policy has gone; negative ones weigh
    less the less likely they have become, so that pushing them down ends by itself. (0, 1) for both is truncated
    importance sampling. The paper reads the sign from the reward after its baseline, which is our advantage; W is the
    ratio of whole sequences (a version per token, such as ROLL's, is another method).

    Raises ValueError unless 0 <= low <= high, both finite.
    """

    positive: Sequence[float] = (1.0, 1.0)
    negative: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            pair = getattr(self, name)
            if not isinstance(pair, Sequence) or len(pair) != 2 or not 0 <= pair[0] <= pair[1] < float("inf"):
                raise ValueError(f"topr: {name} must be a pair (low, high) with 0 <= low <= high, got {pair!r}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        w = bounded_exp(ratios.log_w)
        phi = torch.where(ratios.advantages >= 0, w.clamp(*self.positive), w.clamp(*self.negative))
        token_loss = -ratios.to_tokens(phi * ratios.advantages) * ratios.logprobs
        return token_loss, coefficient_metrics(ratios, phi)
