"""Whether a data set's golds can be answered correctly at all."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vespo.config.problems import RewardConfig
from megatron_vespo.rewards.grader import build_grader
from megatron_vespo.rewards.worker import RewardWorkers


def golds_that_fail(answers: Sequence[str], settings: RewardConfig) -> dict[int, str]:
    """Index of each answer that is not graded 1 when a response boxes it, and why. Raises ConfigError."""
    with RewardWorkers(build_grader(settings), settings.workers, settings.timeout_s) as workers:
        scored = workers.score([(f"\\boxed{{{answer}}}", answer) for answer in answers])
    return {i: s.error or f"graded {s.grade:g}" for i, s in enumerate(scored) if s.error or s.grade < 1.0}
