"""What a file of this folder that bears an objective's name has to provide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.objectives.ratios import Ratios

Kernel = Callable[[Ratios], tuple[torch.Tensor, dict[str, Metric]]]
"""Ratios -> token losses [T] float64 (unscaled, any value where masked) and its own metrics. It must not communicate,
and a gradient may reach a token's loss only through that token's ``logprobs`` or ``log_ratio``."""


@runtime_checkable
class SearchingKernel(Protocol):
    """A kernel with something to find over the whole mini-batch before the first backward pass.

    What it needs must be a sum over tokens, so that it is the same under any split.
    """

    def measure(self, ratios: Ratios) -> torch.Tensor:
        """[k] float64, k fixed: sums over the counted tokens of one micro-batch on this rank."""

    def prepare(self, sums: torch.Tensor) -> Kernel:
        """The kernel for one mini-batch, whose ``measure`` added up to ``sums`` [k]."""
