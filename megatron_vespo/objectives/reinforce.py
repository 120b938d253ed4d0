"""REINFORCE: the policy gradient without importance weights (Williams 1992)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.ratios import Ratios


@dataclass(frozen=True, slots=True)
class Reinforce:
    """l_t = -A log pi_t.

    Off policy it is biased towards what the behaviour policy did, and for A < 0 unbounded: a response that has become
    unlikely is pushed down as hard as ever (TOPR, arXiv 2503.14286, section 2). The control of every comparison.
    """

    def __call__(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        return -ratios.token_advantages() * ratios.logprobs, {}
