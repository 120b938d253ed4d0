"""How token losses become one number. The only place of the project where a loss is scaled.

With N = ``total_tokens`` and M = ``total_sequences`` of the whole mini-batch (all ranks, all micro-batches), l_t the
token losses and T_i the counted tokens of response i:

    token-mean           sum_t l_t / N                       every token weighs the same (DAPO, arXiv 2503.14476, eq. 8;
                                                             the VESPO authors' code for VESPO and GRPO)
    seq-mean-token-sum   sum_t l_t / M                       every response weighs by its length
    seq-mean-token-mean  sum_i (1 / T_i) sum_t l_it / M      every response weighs the same (GRPO, arXiv 2402.03300,
                                                             eq. 3; GSPO and SAPO as published)
    constant             sum_t l_t / (length * M)            Dr.GRPO (arXiv 2503.20783): one constant, such as the
                                                             longest response allowed, instead of the mean length

Each is a sum of terms that belong to one token, so any rank's and any micro-batch's part is added to the others' and
nothing is averaged afterwards: a trainer must SUM gradients over micro-batches, data-parallel and CP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vespo.objectives.ratios import Ratios
from megatron_vespo.objectives.registry import unknown

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant")


@dataclass(frozen=True, slots=True)
class Aggregation:
    """``mode`` is one of AGGREGATIONS; ``length`` (tokens) belongs to ``constant`` alone."""

    mode: str
    length: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in AGGREGATIONS:
            raise unknown("aggregation", self.mode, AGGREGATIONS)
        if self.mode == "constant" and (self.length is None or self.length <= 0):
            raise ValueError(
                f"aggregation 'constant' divides by constant_length * sequences: give constant_length, a positive "
                f"number of tokens such as the longest response allowed (got {self.length})"
            )

    def __call__(
        self, token_loss: torch.Tensor, ratios: Ratios, total_tokens: float, total_sequences: float
    ) -> torch.Tensor:
        """[T] token losses -> 0-d float64, this rank's share. Masked tokens add exactly 0, whatever their loss."""
        counted = torch.where(ratios.mask, token_loss, 0.0)
        match self.mode:
            case "token-mean":
                return counted.sum() / total_tokens
            case "seq-mean-token-sum":
                return counted.sum() / total_sequences
            case "seq-mean-token-mean":
                # Where nothing counts (a response's tokens, padding without any response) 0 / 0 would be NaN.
                return (counted / ratios.to_tokens(ratios.lengths).clamp(min=1)).sum() / total_sequences
            case _:
                assert self.length is not None
                return counted.sum() / (self.length * total_sequences)
