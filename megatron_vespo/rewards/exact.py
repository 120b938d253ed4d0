"""Equality of texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Literal

from megatron_vespo.rewards.extract import last_boxed, last_tagged, undollar


def grade(
    response: str,
    answer: str,
    *,
    where: Literal["box", "answer-tag", "response"] = "box",
    case_sensitive: bool = False,
) -> float:
    """1.0 if the response's answer is the gold text, else 0.0; a response without an answer gets 0.0.

    ``where``: the answer is in the last closed ``\\boxed{}``, in the last ``<answer>...</answer>``, or is the whole
    response. A gold that is boxed, or tagged, is taken out likewise. Both are normalised first (:func:`normalised`).
    """
    takers: dict[str, Callable[[str], str | None]] = {"box": last_boxed, "answer-tag": last_tagged, "response": str}
    take = takers[where]
    given = take(response)
    if given is None:
        return 0.0
    gold = take(answer)
    return float(normalised(given, case_sensitive) == normalised(answer if gold is None else gold, case_sensitive))


def normalised(text: str, case_sensitive: bool = False) -> str:
    """Unicode's compatible forms made one (NFKC), math delimiters around the whole and a full stop at the end left out,
    blanks of any kind and number made one, and, unless told, lower case."""
    text = " ".join(undollar(unicodedata.normalize("NFKC", text)).split())
    text = text.removesuffix(".").rstrip()
    return text if case_sensitive else text.casefold()
