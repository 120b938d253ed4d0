"""DAPO: the clip of decoupled clip and dynamic sampling policy optimization (arXiv 2503.14476)."""

from __future__ import annotations

from megatron_vespo.objectives.grpo import Grpo


def dapo(clip_low: float = 0.2, clip_high: float = 0.28) -> Grpo:
    """GRPO's loss with clip-higher and without dual clip (eq. 8).

    The rest of DAPO is not a loss: set aggregation ``token-mean`` and advantages ``group-mean-std`` (what
    published_settings("dapo") says) for its objective; dynamic sampling and the soft overlong punishment belong to
    rollout and reward, and are not implied here.
    """
    return Grpo(clip_low=clip_low, clip_high=clip_high, dual_clip=None)
