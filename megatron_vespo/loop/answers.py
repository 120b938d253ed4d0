"""The answer that a response votes with: what stands in its last box, spelled in one way."""

from __future__ import annotations

import re

from megatron_vespo.observe.accuracy import Answered
from megatron_vespo.rewards.extract import last_boxed, undollar
from megatron_vespo.samples.records import Sample

LAYOUT = re.compile(r"\\(?:left|right|displaystyle|,|;|:|!|quad|qquad|\s)|~|\s+")
"""What changes how LaTeX looks and not what it says."""
ALIKE = ((re.compile(r"\\[dt]frac"), r"\\frac"), (re.compile(r"\\(?:mbox|textrm|textbf)\b"), r"\\text"))
NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)(?:\.(\d+))?")


def normalised_answer(text: str) -> str | None:
    """What is in the last ``\\boxed{}``, without layout, delimiters and a full stop; numbers without leading zeros,
    thousands commas and decimals that are zero. None: there is no box, or nothing in it.

    A spelling, not a value: 1/2 and 0.5 are two answers. That is the grader's to tell, and it may take long.
    """
    boxed = last_boxed(text)
    if boxed is None:
        return None
    answer = undollar(boxed).rstrip(".")
    for pattern, spelling in ALIKE:
        answer = pattern.sub(spelling, answer)
    answer = LAYOUT.sub("", answer)
    if number := NUMBER.fullmatch(answer):
        sign, whole, decimals = number.groups()
        whole = re.sub(r"\D", "", whole).lstrip("0") or "0"
        decimals = (decimals or "").rstrip("0")
        value = f"{whole}.{decimals}" if decimals else whole
        return f"-{value}" if sign == "-" and value != "0" else value
    return answer or None


def answered(sample: Sample) -> Answered:
    """A graded sample as the arithmetic wants it. An ungraded one counts as wrong."""
    return Answered(
        grade=sample.grade or 0.0,
        answer=normalised_answer(sample.text),
        tokens=len(sample.response_tokens),
        finish=sample.finish_reason,
    )
