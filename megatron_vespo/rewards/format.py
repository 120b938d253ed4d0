"""The form of a response, whatever it says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_vespo.config.load import ConfigError
from megatron_vespo.rewards.extract import last_boxed


def grade(response: str, answer: str, *, pattern: str = "", boxed: bool = False, think: bool = False) -> float:
    """1.0 if the response has every form asked for, else 0.0; ``answer`` is not looked at.

    ``pattern``: a regular expression that is found somewhere in the response (``.`` matches line breaks too; anchor it
    with ``\\A`` and ``\\Z``). ``boxed``: the last ``\\boxed{}`` is closed and not empty. ``think``: one ``<think>`` at
    the start (or none, where the chat template writes it), one ``</think>``, and something after it.
    """
    if pattern and not re.search(pattern, response, re.DOTALL):
        return 0.0
    if boxed and not last_boxed(response):
        return 0.0
    return float(not think or thinks(response))


def thinks(response: str) -> bool:
    thought, closed, said = response.partition("</think>")
    inside = thought.lstrip().removeprefix("<think>")
    return bool(closed and said.strip()) and "<think>" not in inside + said and "</think>" not in said


def check(setting: str, params: Mapping[str, Any]) -> None:
    """Raises ConfigError: a reward that asks for nothing, or a pattern that is none."""
    if not (params.get("pattern") or params.get("boxed") or params.get("think")):
        raise ConfigError(
            f"{setting} = {dict(params)}: the reward format asks for nothing; give at least one of "
            "pattern (a regular expression), boxed: true, think: true"
        )
    try:
        re.compile(params.get("pattern", ""))
    except re.error as error:
        raise ConfigError(f"{setting}.pattern = {params['pattern']!r}: not a regular expression ({error})") from None
