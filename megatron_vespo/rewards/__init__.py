"""Rewards: pure functions ``(response, answer) -> float``, graded in worker processes that can be killed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

RewardFunction = Callable[[str, str], float]

BUILTIN = {"math": "megatron_vespo.rewards.math:grade"}


class RewardError(RuntimeError):
    """A reward function that cannot be found or whose worker cannot start. The message names it and the mend."""


def build_reward(name: str) -> RewardFunction:
    """The reward function called ``name``: ``math``, or the dotted path of one's own, ``package.module.function``."""
    path = BUILTIN.get(name, name)
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not module_name:
        raise RewardError(
            f"reward.name={name!r} is neither one of {', '.join(sorted(BUILTIN))} nor a dotted path such as "
            "my_package.my_module.my_reward."
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise RewardError(
            f"reward.name={name!r}: module {module_name!r} cannot be imported ({error}). "
            "It must be installed or on PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise RewardError(f"reward.name={name!r}: module {module_name!r} has no {attribute!r}.") from error
    if not callable(function):
        raise RewardError(f"reward.name={name!r}: {attribute!r} is a {type(function).__name__}, not a function.")
    return function
