"""From a name and parameters to a callable objective.

An objective is put together from three parts that do not know each other: a correction (which ratio, and a factor on
each token), a kernel (the loss of a token) and an aggregation (how token losses become one number). Only the kernel
differs between objectives.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_vespo.objectives.aggregation import Aggregation
from megatron_vespo.objectives.catalog import OBJECTIVES
from megatron_vespo.objectives.corrections import Correction, build_correction
from megatron_vespo.objectives.inputs import Metric, ObjectiveInputs, ObjectiveOutput
from megatron_vespo.objectives.kernel import Kernel, SearchingKernel
from megatron_vespo.objectives.metrics import correction_metrics, ratio_metrics
from megatron_vespo.objectives.ratios import Ratios, measure_ratios
from megatron_vespo.objectives.registry import construct, unknown


@dataclass(frozen=True, slots=True)
class ComposedObjective:
    """An Objective: ``(ObjectiveInputs) -> ObjectiveOutput``.

    Where ``needs_preparation``, its kernel searches something over the whole mini-batch, and one pass comes first:

        sums = sum(objective.measure(inputs) for inputs in micro_batches)    # without gradients, at the same weights
        torch.distributed.all_reduce(sums)                                   # over all data- and context-parallel ranks
        ready = objective.prepare(sums)                                      # for this one mini-batch
    """

    name: str
    kernel: Kernel | SearchingKernel
    aggregation: Aggregation
    correction: Correction

    @property
    def needs_preparation(self) -> bool:
        return isinstance(self.kernel, SearchingKernel)

    @torch.no_grad()
    def measure(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[k] float64: this rank's share of what the search needs, from one micro-batch; one collective, as a call."""
        if not isinstance(self.kernel, SearchingKernel):
            raise RuntimeError(f"objective {self.name!r} has nothing to search: ask needs_preparation before measuring")
        return self.kernel.measure(measure_ratios(inputs, engine_inside=self.correction.engine_inside))

    def prepare(self, sums: torch.Tensor) -> ComposedObjective:
        """The objective of one mini-batch, given ``measure`` added over all of it."""
        if not isinstance(self.kernel, SearchingKernel):
            raise RuntimeError(f"objective {self.name!r} has nothing to search: it can be called as it is")
        return replace(self, kernel=self.kernel.prepare(sums))

    def token_losses(self, ratios: Ratios) -> tuple[torch.Tensor, dict[str, Metric]]:
        """[T] float64, unscaled, the correction's factor in them (any value where masked); and metrics."""
        if isinstance(self.kernel, SearchingKernel):
            raise RuntimeError(
                f"objective {self.name!r} searches its bounds over the whole mini-batch, a micro-batch's own would "
                "depend on the split: add measure(inputs) over all micro-batches and ranks, then call prepare(sums)"
            )
        token_loss, metrics = self.kernel(ratios)
        if token_loss.shape != ratios.mask.shape:
            raise ValueError(
                f"objective {self.name!r} returned losses of shape {list(token_loss.shape)} for "
                f"{ratios.mask.numel()} tokens: it must return one loss a token and leave their sum to the aggregation"
            )
        factor = self.correction.factor(ratios)
        if factor is not None:
            token_loss = token_loss * factor
            metrics = metrics | correction_metrics(ratios, factor)
        return token_loss, metrics

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        ratios = measure_ratios(inputs, engine_inside=self.correction.engine_inside)
        token_loss, metrics = self.token_losses(ratios)
        loss = self.aggregation(token_loss, ratios, inputs.total_tokens, inputs.total_sequences)
        return ObjectiveOutput(loss=loss, metrics=ratio_metrics(ratios) | metrics)


def build_objective(
    name: str,
    *,
    aggregation: str = "token-mean",
    constant_length: float | None = None,
    correction: str = "none",
    correction_params: Mapping[str, Any] | None = None,
    **params: Any,
) -> ComposedObjective:
    """Build an objective.

    Args:
        name: one of available_objectives(), or the dotted path ``package.module.factory`` of one's own: a callable that
            takes ``params`` and returns a Kernel (or a SearchingKernel).
        aggregation: one of aggregation.AGGREGATIONS, which says what they are. It is never implied by the name, so that
            a comparison of objectives varies nothing else; published_settings(name) gives that of the paper.
        constant_length: tokens; the constant of aggregation ``constant``, unused by the others.
        correction: one of corrections.CORRECTIONS, which says what they are.
        correction_params: the correction's own, such as ``{"level": "sequence", "cap": 2.0}``.
        params: the objective's own, documented in its file; left out: the defaults of its paper.

    Raises:
        ValueError: a name, parameter or value that does not exist; the message names the nearest or all that do.
    """
    return ComposedObjective(
        name=name,
        kernel=construct("objective", name, _find_factory(name), params),
        aggregation=Aggregation(aggregation, constant_length),
        correction=build_correction(correction, correction_params or {}),
    )


def _find_factory(name: str) -> Callable[..., Kernel | SearchingKernel]:
    if name in OBJECTIVES:
        return OBJECTIVES[name].factory
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise unknown("objective", name, sorted(OBJECTIVES), ", or a dotted path package.module.factory")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name!r}: cannot import {attribute!r} from {module_name!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"objective {name!r} is a {type(factory).__name__}, not a factory that returns a kernel")
    return factory
