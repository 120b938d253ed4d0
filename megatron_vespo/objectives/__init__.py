"""RL objectives as functions of log-probs, advantages and masks; exact under any split of a mini-batch."""

from megatron_vespo.objectives.advantages import group_advantages
from megatron_vespo.objectives.build import ComposedObjective, build_objective
from megatron_vespo.objectives.catalog import available_objectives, published_settings
from megatron_vespo.objectives.ess import ess_step_scale
from megatron_vespo.objectives.inputs import Metric, Objective, ObjectiveInputs, ObjectiveOutput
from megatron_vespo.objectives.kernel import Kernel, SearchingKernel
from megatron_vespo.objectives.ratios import Ratios

__all__ = [
    "ComposedObjective",
    "Kernel",
    "Metric",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "Ratios",
    "SearchingKernel",
    "available_objectives",
    "build_objective",
    "ess_step_scale",
    "group_advantages",
    "published_settings",
]
