"""From a name and parameters to a callable objective.

An objective is put together from three parts that do not know each other: a correction (which ratio), a kernel (the
loss of a token) and an aggregation (how token losses become one number). Only the kernel differs between objectives.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vespo.objectives.aggregation import Aggregation
from megatron_vespo.objectives.corrections import Correction, get_correction
from megatron_vespo.objectives.grpo import Grpo
from megatron_vespo.objectives.gspo import Gspo
from megatron_vespo.objectives.inputs import Metric, Objective, ObjectiveInputs, ObjectiveOutput
from megatron_vespo.objectives.metrics import ratio_metrics
from megatron_vespo.objectives.ratios import Ratios, measure_ratios
from megatron_vespo.objectives.sapo import Sapo
from megatron_vespo.objectives.vespo import Vespo

Kernel = Callable[[Ratios], tuple[torch.Tensor, dict[str, Metric]]]
"""Ratios -> token losses [T] float64 (unscaled, any value where masked) and its own metrics. It must not communicate,
and a gradient may reach a token's loss only through that token's ``logprobs`` or ``log_ratio``."""

OBJECTIVES: dict[str, Callable[..., Kernel]] = {"grpo": Grpo, "gspo": Gspo, "sapo": Sapo, "vespo": Vespo}


@dataclass(frozen=True, slots=True)
class ComposedObjective:
    """An Objective: ``(ObjectiveInputs) -> ObjectiveOutput``."""

    name: str
    kernel: Kernel
    aggregation: Aggregation
    correction: Correction

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        ratios = measure_ratios(inputs, self.correction)
        token_loss, metrics = self.kernel(ratios)
        if token_loss.shape != ratios.mask.shape:
            raise ValueError(
                f"objective {self.name!r} returned losses of shape {list(token_loss.shape)} for "
                f"{ratios.mask.numel()} tokens: it must return one loss a token and leave their sum to the aggregation"
            )
        loss = self.aggregation(token_loss, ratios, inputs.total_tokens, inputs.total_sequences)
        return ObjectiveOutput(loss=loss, metrics=ratio_metrics(ratios) | metrics)


def available_objectives() -> list[str]:
    """Names that build_objective knows, sorted."""
    return sorted(OBJECTIVES)


def build_objective(
    name: str,
    *,
    aggregation: str = "token-mean",
    constant_length: float | None = None,
    correction: str = "none",
    **params: Any,
) -> Objective:
    """Build an objective.

    Args:
        name: one of available_objectives(), or the dotted path ``package.module.factory`` of one's own: a callable that
            takes ``params`` and returns a Kernel.
        aggregation: one of aggregation.AGGREGATIONS, which says what they are.
        constant_length: tokens; the constant of aggregation ``constant``, unused by the others.
        correction: one of corrections.CORRECTIONS, which says what they are.
        params: the objective's own, documented in its file; left out: the defaults of its paper.

    Raises:
        ValueError: a name, parameter or value that does not exist; the message names the nearest or all that do.
    """
    factory = _find_factory(name)
    try:
        inspect.signature(factory).bind(**params)
    except TypeError as error:
        parameters = inspect.signature(factory).parameters.values()
        known = ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)
        raise ValueError(f"objective {name!r}: {error}; its parameters are: {known or 'none'}") from None
    return ComposedObjective(
        name=name,
        kernel=factory(**params),
        aggregation=Aggregation(aggregation, constant_length),
        correction=get_correction(correction),
    )


def _find_factory(name: str) -> Callable[..., Kernel]:
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        near = difflib.get_close_matches(name.lower(), OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown objective {name!r}{hint} (available: {', '.join(available_objectives())}, "
            "or a dotted path package.module.factory)"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name!r}: cannot import {attribute!r} from {module_name!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"objective {name!r} is a {type(factory).__name__}, not a factory that returns a kernel")
    return factory
