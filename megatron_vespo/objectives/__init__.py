"""RL objectives as functions of log-probs, advantages and masks; exact under any split of a mini-batch."""

from megatron_vespo.objectives.advantages import group_advantages
from megatron_vespo.objectives.build import Kernel, available_objectives, build_objective
from megatron_vespo.objectives.inputs import Metric, Objective, ObjectiveInputs, ObjectiveOutput
from megatron_vespo.objectives.metrics import add_metrics, summarize_metrics
from megatron_vespo.objectives.ratios import Ratios

__all__ = [
    "Kernel",
    "Metric",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "Ratios",
    "add_metrics",
    "available_objectives",
    "build_objective",
    "group_advantages",
    "summarize_metrics",
]
