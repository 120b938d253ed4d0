"""The objective that a run's config asks for."""

from __future__ import annotations

from megatron_vespo.config.schema import RunConfig
from megatron_vespo.objectives import build_objective
from megatron_vespo.objectives.build import ComposedObjective


def objective_of(config: RunConfig) -> ComposedObjective:
    """Raises ValueError for a name or parameter that does not exist."""
    return build_objective(
        config.objective.name,
        aggregation=config.objective.aggregation,
        constant_length=float(config.rollout.max_response_tokens),
        correction=config.objective.correction,
        correction_params=config.objective.correction_params,
        **config.objective.params,
    )
