"""Rewards: pure functions ``(response, answer) -> float``, graded in worker processes that can be killed."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vespo.config.dotted import import_function

RewardFunction = Callable[[str, str], float]

BUILTIN = {"math": "megatron_vespo.rewards.math:grade"}


class RewardError(RuntimeError):
    """A reward worker that cannot start. The message names the function and the mend."""


def build_reward(name: str) -> RewardFunction:
    """The reward function called ``name``: ``math``, or the dotted path of one's own, ``package.module.function``.

    Raises ConfigError where there is none.
    """
    return import_function("reward.name", BUILTIN.get(name, name), known=", ".join(sorted(BUILTIN)))
