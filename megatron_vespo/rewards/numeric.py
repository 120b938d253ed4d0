"""Equality of numbers, within a tolerance."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_vespo.rewards.extract import last_boxed

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
EXPONENT = r"(?:[eE][+-]?\d{1,3})?"
FRACTION = r"\\[dt]?frac\s*\{\s*(?P<over>[+-]?\d+)\s*\}\s*\{\s*(?P<under>\d+)\s*\}"
NUMBER = re.compile(
    rf"(?<![\d.])(?P<sign>[-−+]?)\s*(?:{FRACTION}|(?P<decimal>{DECIMAL})(?P<exponent>{EXPONENT})(?:\s*/\s*(?P<divisor>\d+))?)"
)
SUBTRACTS = re.compile(r"[\w)\]}]\s*$")


def grade(
    response: str,
    answer: str,
    *,
    absolute: float = 0.0,
    relative: float = 0.0,
    box_only: bool = False,
) -> float:
    """1.0 if the response's last number is the gold's last number, else 0.0.

    Looked for in the last closed ``\\boxed{}``; where there is no box, in the whole response, unless ``box_only``.
    Equal: they differ by no more than ``absolute``, or than ``relative`` times the gold's size; both 0: exactly (in
    rational numbers: 0.50 is 1/2, and 0.1 is a tenth). Raises ValueError where the gold has no number.
    """
    gold = last_number(answer)
    if gold is None:
        raise ValueError(f"the gold answer {answer[:80]!r} holds no number")
    inside = last_boxed(response)
    if inside is None and box_only:
        return 0.0
    given = last_number(response if inside is None else inside)
    if given is None:
        return 0.0
    return float(abs(given - gold) <= max(Fraction(absolute), Fraction(relative) * abs(gold)))


def last_number(text: str) -> Fraction | None:
    """Such as ``-1,234.5``, ``2e-3``, ``3/4`` or ``\\frac{3}{4}``; None if there is none. A minus after a digit, a
    letter or a closing bracket subtracts: the last number of ``10-3`` is 3."""
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    if match["over"]:
        under = int(match["under"])
        value = Fraction(int(match["over"]), under) if under else None
    else:
        value = Fraction(match["decimal"].replace(",", "") + match["exponent"])
        if match["divisor"]:
            value = value / int(match["divisor"]) if int(match["divisor"]) else None
    if value is None:
        return None
    negative = match["sign"] in ("-", "−") and not SUBTRACTS.search(text[: match.start()])
    return -value if negative else value
