"""Dr.GRPO: GRPO done right, without its biases of length and difficulty (arXiv 2503.20783)."""

from __future__ import annotations

from megatron_vespo.objectives.grpo import Grpo


def dr_grpo(clip_low: float = 0.2, clip_high: float = 0.2) -> Grpo:
    """PPO's token loss with the symmetric clip of the paper's code and no dual clip.

    What makes it Dr.GRPO is outside the loss: aggregation ``constant`` (no division by the response's own length, which
    favours long wrong answers) and advantages ``group-mean`` (no division by the group's standard deviation, which
    favours prompts that are nearly always or nearly never solved). Both must be set; published_settings("dr_grpo")
    names them. With others this is GRPO under another name.
    """
    return Grpo(clip_low=clip_low, clip_high=clip_high, dual_clip=None)
