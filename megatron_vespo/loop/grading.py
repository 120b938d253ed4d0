"""Samples and their graders."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vespo.rewards.grader import Scored
from megatron_vespo.rewards.worker import RewardWorkers
from megatron_vespo.samples.records import Sample


def grade(samples: Sequence[Sample], rewards: RewardWorkers) -> list[Scored]:
    """Sets each one's ``grade``, and ``metadata["reward_error"]`` where grading it failed; returns what they said."""
    scores = rewards.score([(s.text, s.prompt.answer) for s in samples], named=[s.prompt.reward for s in samples])
    for sample, score in zip(samples, scores, strict=True):
        sample.grade = score.grade
        if score.error:
            sample.metadata["reward_error"] = score.error
    return scores
