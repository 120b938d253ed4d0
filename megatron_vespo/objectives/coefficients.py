"""What an objective does with each token: the coefficient c_t by which it weighs A grad log pi_t.

Read off the gradient of the objective itself, so that it holds for any, one's own included:

    gradient of the token losses = -sum_t c_t A grad log pi_t

VESPO has c_t = phi(W) on every token of a response, GRPO the ratio, or 0 where the clip took the gradient away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_vespo.objectives.build import ComposedObjective
from megatron_vespo.objectives.inputs import ObjectiveInputs
from megatron_vespo.objectives.ratios import measure_ratios
from megatron_vespo.objectives.sequence import segment_sums


@torch.enable_grad()
def token_coefficients(objective: ComposedObjective, inputs: ObjectiveInputs) -> torch.Tensor:
    """[T] float64: c_t, the correction's factor in it; 0 where the mask is False, NaN where A = 0 (nothing is weighed).

    ``objective`` is prepared already where it searches its bounds. One collective if the tokens are sharded.
    """
    leaf = inputs.logprobs.detach().to(torch.float64).requires_grad_()
    ratios = measure_ratios(replace(inputs, logprobs=leaf), engine_inside=objective.correction.engine_inside)
    token_loss, _ = objective.token_losses(ratios)
    (gradient,) = torch.autograd.grad(torch.where(ratios.mask, token_loss, 0.0).sum(), leaf)
    advantages = ratios.token_advantages()
    coefficients = torch.where(advantages == 0, torch.nan, -gradient / torch.where(advantages == 0, 1.0, advantages))
    return torch.where(ratios.mask, coefficients, 0.0)


@dataclass(frozen=True, slots=True)
class ResponseWeights:
    """Of each response, all [S] float64 and the same on every rank of the context-parallel group."""

    lengths: torch.Tensor
    """Counted tokens; a response with none has 0 everywhere."""
    log_w_stale: torch.Tensor
    log_w_engine: torch.Tensor
    phi: torch.Tensor
    """Mean of c_t over the counted tokens, over that of a response on policy (which is 1 for nearly every objective, so
    that VESPO's phi is its own); NaN where A = 0."""
    phi_stale: torch.Tensor
    """phi had the engine sampled with the trainer's own log-probs: what staleness alone does."""
    phi_engine: torch.Tensor
    """phi had the weights not moved since: what the engine's mismatch alone does."""


def response_weights(objective: ComposedObjective, inputs: ObjectiveInputs) -> ResponseWeights:
    """``objective`` is prepared already where it searches its bounds. Several collectives: not for the hot path under
    context parallelism; give it whole responses (``cp_group`` None)."""
    ratios = measure_ratios(inputs, engine_inside=True)
    old = inputs.old_logprobs
    on_policy = replace(inputs, logprobs=old, rollout_logprobs=old)
    exact_engine = replace(inputs, rollout_logprobs=old)
    fresh = replace(inputs, logprobs=old)
    columns = [token_coefficients(objective, case) for case in (on_policy, inputs, exact_engine, fresh)]
    sums = segment_sums(columns, ratios.segment_ids, inputs.num_segments, inputs.cp_group)
    base, *wholes = (sums / ratios.lengths.clamp(min=1)[:, None]).unbind(-1)
    phi, phi_stale, phi_engine = (whole / torch.where(base == 0, 1.0, base) for whole in wholes)
    return ResponseWeights(ratios.lengths, ratios.log_w_stale, ratios.log_w_engine, phi, phi_stale, phi_engine)
