"""Several objectives on the same mini-batch, side by side, from its log-probs alone: no model is needed.

With respect to the log-probs, the gradient of a loss is one number a token,

    g_t = d loss / d log pi_t = -c_t A a_t,

c_t being the objective's coefficient (coefficients.py) and a_t what the aggregation makes of a token. Two objectives
point the same way where their g do. (Where grad log pi_t of different tokens overlap, as they do in the parameters,
angles differ: policy/gradients.py measures those.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_vespo.objectives.budget import DEAD
from megatron_vespo.objectives.build import ComposedObjective
from megatron_vespo.objectives.coefficients import response_weights, token_coefficients
from megatron_vespo.objectives.inputs import ObjectiveInputs
from megatron_vespo.objectives.ratios import measure_ratios
from megatron_vespo.objectives.sequence import segment_sums


@dataclass(frozen=True, slots=True)
class Weighing:
    """What one objective makes of each response; all [S] float64."""

    phi: torch.Tensor
    """As in ResponseWeights: mean coefficient over that of a response on policy; NaN where A = 0."""
    coefficients: torch.Tensor
    """Sum of c_t over the counted tokens; NaN where A = 0."""
    zeros: torch.Tensor
    """Counted tokens with c_t = 0."""
    pull: torch.Tensor
    """Sum of |g_t| over the counted tokens: its part of the gradient."""


@dataclass(frozen=True, slots=True)
class WeighedBatch:
    """One mini-batch under K objectives, or several mini-batches laid end to end."""

    advantages: torch.Tensor
    """[S] float64, as are the next three."""
    lengths: torch.Tensor
    """Counted tokens."""
    log_w_stale: torch.Tensor
    log_w_engine: torch.Tensor
    weighings: dict[str, Weighing]
    """Label of the objective -> what it does; K of them."""
    products: torch.Tensor
    """[K, K] float64: inner products of the objectives' g."""

    @property
    def counted(self) -> torch.Tensor:
        """[S] bool: responses that can teach anything, with a counted token and A other than 0."""
        return (self.lengths > 0) & (self.advantages != 0)


@dataclass(frozen=True, slots=True)
class Summary:
    """One objective on a WeighedBatch, over its ``counted`` responses; NaN where there is none to speak of.

    positive: those with A > 0, negative: those with A < 0.
    """

    coefficient: float
    """Mean of c_t over tokens."""
    coefficient_positive: float
    coefficient_negative: float
    zero_tokens: float
    """Share of tokens with c_t = 0."""
    thrown_away: float
    """Share of responses with |phi| < DEAD."""
    thrown_away_positive: float
    thrown_away_negative: float
    ess: float
    """(sum phi)^2 / (n sum phi^2), in [0, 1]."""
    top_tenth: float
    """Part of the sum of |g_t| that the tenth of the responses with the largest sums carries."""
    by_length: list[float]
    """Parts of the sum of |g_t| that the shortest to the longest quarter of the responses carry (parts_by_length)."""


@dataclass(frozen=True, slots=True)
class Angles:
    """Of K gradients."""

    norms: list[float]
    cosines: list[list[float]]
    """[K][K]; NaN with a gradient that is 0."""


def weigh(objectives: Mapping[str, ComposedObjective], micro_batches: Sequence[ObjectiveInputs]) -> WeighedBatch:
    """All ``objectives`` on one mini-batch of whole responses (``cp_group`` None), however it is cut.

    An objective that searches its bounds is prepared on all of it. The denominators of ``micro_batches`` are those of
    the mini-batch.
    """
    ready = {label: prepared(objective, micro_batches) for label, objective in objectives.items()}
    return join([_weigh(ready, inputs) for inputs in micro_batches])


def prepared(objective: ComposedObjective, micro_batches: Sequence[ObjectiveInputs]) -> ComposedObjective:
    """``objective`` with the bounds that it finds in the mini-batch, if it searches any."""
    if not objective.needs_preparation:
        return objective
    return objective.prepare(torch.stack([objective.measure(inputs) for inputs in micro_batches]).sum(0))


def _weigh(objectives: Mapping[str, ComposedObjective], inputs: ObjectiveInputs) -> WeighedBatch:
    ratios = measure_ratios(inputs, engine_inside=True)
    weighings, gradients = {}, []
    for label, objective in objectives.items():
        coefficients = token_coefficients(objective, inputs)
        gradient = loss_gradient(objective, inputs)
        columns = [coefficients, inputs.mask & (coefficients == 0), gradient.abs()]
        total, zeros, pull = segment_sums(columns, ratios.segment_ids, inputs.num_segments).unbind(-1)
        weighings[label] = Weighing(response_weights(objective, inputs).phi, total, zeros, pull)
        gradients.append(gradient)
    g = torch.stack(gradients)
    return WeighedBatch(
        advantages=ratios.advantages,
        lengths=ratios.lengths,
        log_w_stale=ratios.log_w_stale,
        log_w_engine=ratios.log_w_engine,
        weighings=weighings,
        products=g @ g.T,
    )


@torch.enable_grad()
def loss_gradient(objective: ComposedObjective, inputs: ObjectiveInputs) -> torch.Tensor:
    """[T] float64: g_t, of the share of the loss that these tokens have; 0 where the mask is False."""
    leaf = inputs.logprobs.detach().to(torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(replace(inputs, logprobs=leaf)).loss, leaf)
    return gradient


def join(batches: Sequence[WeighedBatch]) -> WeighedBatch:
    """Several under the same objectives, end to end: the inner products of their gradients add up."""

    def weighing(label: str) -> Weighing:
        parts = [batch.weighings[label] for batch in batches]
        return Weighing(
            phi=torch.cat([part.phi for part in parts]),
            coefficients=torch.cat([part.coefficients for part in parts]),
            zeros=torch.cat([part.zeros for part in parts]),
            pull=torch.cat([part.pull for part in parts]),
        )

    return WeighedBatch(
        advantages=torch.cat([batch.advantages for batch in batches]),
        lengths=torch.cat([batch.lengths for batch in batches]),
        log_w_stale=torch.cat([batch.log_w_stale for batch in batches]),
        log_w_engine=torch.cat([batch.log_w_engine for batch in batches]),
        weighings={label: weighing(label) for label in batches[0].weighings},
        products=torch.stack([batch.products for batch in batches]).sum(0),
    )


def length_edges(batch: WeighedBatch) -> list[float]:
    """The quartiles of the lengths of the counted responses; NaN where there is none."""
    lengths = batch.lengths[batch.counted]
    return torch.quantile(lengths, lengths.new_tensor([0.25, 0.5, 0.75])).tolist() if len(lengths) else [math.nan] * 3


def parts_by_length(batch: WeighedBatch, values: torch.Tensor) -> list[float]:
    """What part of the sum of ``values`` [S] the shortest to the longest quarter of the counted responses have.

    A response as long as a quartile is in the quarter below it, so that quarters of few different lengths are uneven.
    """
    edges = torch.tensor(length_edges(batch), dtype=torch.float64)
    group = torch.bucketize(batch.lengths[batch.counted], edges)
    counted = values[batch.counted]
    return [_ratio(counted[group == i].sum(), counted.sum()) for i in range(4)]


def summarize(batch: WeighedBatch) -> dict[str, Summary]:
    """Label -> what the objective does with the batch."""
    positive, negative = batch.counted & (batch.advantages > 0), batch.counted & (batch.advantages < 0)
    tenth = math.ceil(int(batch.counted.sum()) / 10)

    def summary(weighing: Weighing) -> Summary:
        phi, pull = weighing.phi[batch.counted], weighing.pull[batch.counted]
        dead = weighing.phi.abs() < DEAD

        def coefficient(among: torch.Tensor) -> float:
            return _ratio(weighing.coefficients[among].sum(), batch.lengths[among].sum())

        def share(of: torch.Tensor, among: torch.Tensor) -> float:
            return _ratio(of[among].sum(), among.sum())

        return Summary(
            coefficient=coefficient(batch.counted),
            coefficient_positive=coefficient(positive),
            coefficient_negative=coefficient(negative),
            zero_tokens=_ratio(weighing.zeros[batch.counted].sum(), batch.lengths[batch.counted].sum()),
            thrown_away=share(dead, batch.counted),
            thrown_away_positive=share(dead, positive),
            thrown_away_negative=share(dead, negative),
            ess=_ratio(phi.sum() ** 2, len(phi) * (phi * phi).sum()),
            top_tenth=_ratio(pull.sort(descending=True).values[:tenth].sum(), pull.sum()),
            by_length=parts_by_length(batch, weighing.pull),
        )

    return {label: summary(weighing) for label, weighing in batch.weighings.items()}


def angles(products: torch.Tensor) -> Angles:
    """Norms and cosines from the inner products [K, K] of K gradients."""
    norms = products.diagonal().clamp(min=0).sqrt()
    # A cosine of 1 + 1e-16 would be nothing but rounding.
    cosines = (products / torch.outer(norms, norms)).clamp(-1, 1)
    return Angles(norms.tolist(), cosines.tolist())


def disputes(batch: WeighedBatch) -> torch.Tensor:
    """[S] float64: by what factor the objectives' |phi| of a response differ, those below DEAD counted as DEAD; 1
    where they agree, and where the response teaches nothing."""
    sizes = torch.stack([weighing.phi.abs() for weighing in batch.weighings.values()]).clamp(min=DEAD)
    return torch.where(batch.counted, sizes.amax(0) / sizes.amin(0), 1.0)


def phi_curve(objective: ComposedObjective, log_w: torch.Tensor, length: int, *, positive: bool) -> torch.Tensor:
    """[n] float64: phi of a response of ``length`` tokens with ``log_w`` [n] spread evenly over them, A = 1 or -1.

    The ratio is of staleness alone, the engine exact. ``objective`` is prepared already where it searches its bounds.
    """
    responses = len(log_w)
    old = torch.full((responses * length,), -1.0, dtype=torch.float64)
    inputs = ObjectiveInputs(
        logprobs=old + torch.repeat_interleave(log_w.to(torch.float64) / length, length),
        old_logprobs=old,
        rollout_logprobs=old,
        mask=torch.ones_like(old, dtype=torch.bool),
        segment_ids=torch.repeat_interleave(torch.arange(responses), length),
        advantages=torch.full((responses,), 1.0 if positive else -1.0, dtype=torch.float64),
        num_segments=responses,
        total_tokens=float(len(old)),
        total_sequences=float(responses),
    )
    return response_weights(objective, inputs).phi


def _ratio(part: torch.Tensor | float, whole: torch.Tensor | float) -> float:
    part, whole = float(part), float(whole)
    return part / whole if whole else math.nan
