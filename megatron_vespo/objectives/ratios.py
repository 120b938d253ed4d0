"""From a micro-batch to what every objective works on: log-ratios per token, and their sums per response."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vespo.objectives.inputs import ObjectiveInputs
from megatron_vespo.objectives.sequence import segment_sums

LOG_RATIO_BOUND = 20.0
"""Largest |log ratio| that is exponentiated: e^20 = 4.9e8 is far outside every clip and kernel, its square finite."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """All float64: a few numbers a token are nothing beside its logits, and any split gives the same result.

    Per-token tensors are 0 (``segment_ids``: 0) where the mask is False, whatever the inputs held there. A counted
    token whose log-prob is NaN is not hidden: it makes the loss NaN.
    """

    logprobs: torch.Tensor
    """[T], with grad."""
    log_ratio: torch.Tensor
    """[T], with grad: log pi - log of the behaviour policy, which is mu or pi_old as the correction has it."""
    log_stale: torch.Tensor
    """[T], detached: log pi - log pi_old."""
    log_engine: torch.Tensor
    """[T], detached: log pi_old - log mu."""
    mask: torch.Tensor
    """[T] bool."""
    segment_ids: torch.Tensor
    """[T] int64, in range also where masked."""
    advantages: torch.Tensor
    """[S]."""
    lengths: torch.Tensor
    """[S], detached: counted tokens of each response, over all CP ranks (0: none counts)."""
    log_w: torch.Tensor
    """[S], detached: ``log_ratio`` summed over each response; no length normalisation, not clamped."""
    log_w_stale: torch.Tensor
    """[S], detached."""
    log_w_engine: torch.Tensor
    """[S], detached."""
    owns_sequences: bool
    """Whether this rank is the one of its CP group that reports what is counted per response."""

    def to_tokens(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """[S] -> [T]: each token gets its response's value; what a masked one gets means nothing."""
        if not per_sequence.numel():
            return torch.zeros_like(self.log_stale)
        return per_sequence[self.segment_ids]

    def token_advantages(self) -> torch.Tensor:
        """[T] The response's own, never that of its first token: that one may be masked and say nothing."""
        return self.to_tokens(self.advantages)

    def per_token_mean(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """[S] sums over a response -> [S] means over its counted tokens; 0 where none counts."""
        return per_sequence / self.lengths.clamp(min=1)

    def token_ratio(self) -> torch.Tensor:
        """[T], with grad: exp(log_ratio), constant beyond LOG_RATIO_BOUND; exp would reach inf, its gradient NaN."""
        return bounded_exp(self.log_ratio)


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def measure_ratios(inputs: ObjectiveInputs, *, engine_inside: bool) -> Ratios:
    """Clean the masked tokens, take log-ratios, sum them; the only communication of an objective happens here.

    ``engine_inside``: whether the ratio of the objective is pi / mu, or pi / pi_old (corrections.py).
    """
    mask = inputs.mask

    def counted(values: torch.Tensor) -> torch.Tensor:
        # where, not a product: 0 * NaN is NaN. Its backward hands exactly 0 to a masked log-prob.
        return torch.where(mask, values.to(torch.float64), 0.0)

    segment_ids = torch.where(mask, inputs.segment_ids, 0)
    logprobs, old, engine = (counted(x) for x in (inputs.logprobs, inputs.old_logprobs, inputs.rollout_logprobs))
    log_stale = logprobs - old.detach()
    log_engine = (old - engine).detach()
    # The sums of both factors, not of their product: staleness and engine mismatch stay told apart.
    sums = segment_sums([mask, log_stale, log_engine], segment_ids, inputs.num_segments, inputs.cp_group)
    lengths, log_w_stale, log_w_engine = sums.unbind(-1)
    return Ratios(
        logprobs=logprobs,
        log_ratio=log_stale + log_engine if engine_inside else log_stale,
        log_stale=log_stale.detach(),
        log_engine=log_engine,
        mask=mask,
        segment_ids=segment_ids,
        advantages=inputs.advantages.detach().to(torch.float64),
        lengths=lengths,
        log_w=log_w_stale + log_w_engine if engine_inside else log_w_stale,
        log_w_stale=log_w_stale,
        log_w_engine=log_w_engine,
        owns_sequences=inputs.cp_group is None or dist.get_rank(inputs.cp_group) == 0,
    )
