"""Rewards: pure functions ``(response, answer, **params) -> float``, graded in worker processes that can be killed."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vespo.config.dotted import import_function

RewardFunction = Callable[..., float]

BUILTIN = {name: f"megatron_vespo.rewards.{name}:grade" for name in ("code", "exact", "format", "math", "numeric")}


class RewardError(RuntimeError):
    """A reward worker that cannot start. The message names the function and the mend."""


def build_reward(name: str, setting: str = "reward.name") -> RewardFunction:
    """The reward function called ``name``: a built-in, or the dotted path of one's own, ``package.module.function``.

    Raises ConfigError, which names ``setting``, where there is none.
    """
    return import_function(setting, BUILTIN.get(name, name), known=", ".join(sorted(BUILTIN)))
