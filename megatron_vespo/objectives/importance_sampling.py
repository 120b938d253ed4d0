"""Plain importance sampling, truncated or not, per token or per sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.metrics import coefficient_metrics, per_token
from megatron_vespo.objectives.ratios import Ratios, bounded_exp


@dataclass(frozen=True, slots=True)
class ImportanceSampling:
    """l_t = -sg[min(w, cap)] A log pi_t,    w = W (``level`` sequence) or r_t (``level`` token).

    With W and no cap (the default) it is the unbiased off-policy gradient (VESPO, arXiv 2602.10693v3, eq. 3), whose
    variance grows exponentially with the length; W is held at e^20 at most. With a cap it is truncated importance
    sampling (Ionides 2008); VCPO (arXiv 2602.17616) takes W and cap 8, together with its step scale (ess.py). r_t
    keeps only the diagonal of W's expansion (VESPO, Appendix A). Metrics: ``phi``, the coefficient (sequence), and
    ``clip_fraction``, the share of tokens whose weight is above the cap.

    Raises ValueError where the cap is not positive or the level unknown.
    """

    level: Literal["token", "sequence"] = "sequence"
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ValueError(f"importance_sampling: level must be token or sequence, got {self.level!r}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"importance_sampling: cap must be positive (or None), got {self.cap}")

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        sequence = self.level == "sequence"
        weight = bounded_exp(ratios.log_w) if sequence else ratios.token_ratio().detach()
        capped = weight if self.cap is None else weight.clamp(max=self.cap)
        metrics = coefficient_metrics(ratios, capped) if sequence else {}
        above = (weight > capped).to(weight.dtype)
        if sequence:
            capped, above = ratios.to_tokens(capped), ratios.to_tokens(above)
        token_loss = -capped * ratios.token_advantages() * ratios.logprobs
        return token_loss, metrics | {"clip_fraction": per_token(ratios, above)}
