"""One rollout batch, sampled and graded: prompt groups until there are enough worth training on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_vespo.loop.run import Run
from megatron_vespo.samples.records import Sample

Group = list[Sample]
"""The responses to one prompt."""


def collect(run: Run, step: int) -> list[Sample]:
    """Rollout batch number ``step``: ``train.prompts_per_step`` prompt groups, side by side.

    Under dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) a group whose rewards are all equal has no advantage
    and is dropped; further rounds of prompts fill its place. What the last round brings beyond the batch is dropped
    too; groups without spread serve where ``rollout.max_rounds`` did not bring enough. Both are counted.
    """
    settings, wanted = run.config.rollout, run.config.train.prompts_per_step
    if not settings.dynamic_sampling:
        return _sampled(run, wanted, step, "train")

    kept: list[Group] = []
    flat: list[Group] = []
    rounds = 0
    while len(kept) < wanted and rounds < settings.max_rounds:
        asked = min(math.ceil((wanted - len(kept)) * settings.over_sample), len(run.prompts.prompts))
        for group in _groups(_sampled(run, asked, step, f"train.{rounds}"), settings.samples_per_prompt):
            (kept if has_spread(group) else flat).append(group)
        rounds += 1
    batch = (kept + flat)[:wanted]
    run.drop(kept[wanted:], "beyond the batch")
    run.drop(flat[max(0, wanted - len(kept)) :], "no spread")
    asked_for = len(kept) + len(flat)
    run.metrics.add("dynamic_sampling/rounds", rounds)
    run.metrics.add("dynamic_sampling/groups_asked", asked_for)
    run.metrics.add("dynamic_sampling/without_spread", len(flat), asked_for)
    run.metrics.add("dynamic_sampling/dropped", asked_for - len(batch), asked_for)
    return [sample for group in batch for sample in group]


def _sampled(run: Run, prompts: int, step: int, batch: str) -> list[Sample]:
    with run.phase("rollout"):
        samples = run.rollout(run.prompts.next(prompts), step=step, batch=batch)
    with run.phase("reward"):
        run.reward(samples)
    return samples


def _groups(samples: Sequence[Sample], size: int) -> list[Group]:
    return [list(samples[i : i + size]) for i in range(0, len(samples), size)]


def has_spread(group: Group) -> bool:
    return len({sample.reward for sample in group}) > 1
