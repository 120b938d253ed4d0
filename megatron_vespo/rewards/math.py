"""Mathematical answers, compared by math-verify 0.9 (the grader of the paper).

Both sides are parsed from inside a ``\\boxed{}``. The published evaluation parsed golds as bare text, where
math-verify looks for plain numbers only: ``2\\sqrt{5}`` became 2 and most LaTeX golds could not be answered correctly.
"""

from __future__ import annotations

import logging
import re

from math_verify import LatexExtractionConfig, parse, verify

from megatron_vespo.rewards.extract import BOX, last_boxed, undollar

# math-verify warns once a process that its own timeouts are off. They are, on purpose: they rest on SIGALRM, which
# works in a main thread only and cannot interrupt a long bignum operation. RewardWorkers kills the process instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

INTEGER = re.compile(r"-?\d{1,15}")
INTEGER_GOLD = re.compile(r"(-?\d{1,15})(?:\.0+)?")
EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0)]


def grade(response: str, answer: str) -> float:
    """1.0 if the last ``\\boxed{}`` of the response equals the gold answer, else 0.0.

    A response without a box, or whose last box is not closed, gets 0.0. ``answer`` may be bare LaTeX, LaTeX between
    dollars, or a text that boxes it. May run for very long on hostile input: call it through RewardWorkers.
    """
    given = last_boxed(response)
    if given is None:
        return 0.0
    gold = answer
    if BOX in answer:
        gold = last_boxed(answer) or answer
    gold = undollar(gold)
    if (gold_integer := INTEGER_GOLD.fullmatch(gold)) and INTEGER.fullmatch(given):
        # math-verify's own verdict on two integers (tested), three orders of magnitude sooner.
        return float(int(gold_integer[1]) == int(given))
    return float(grade_parsed(given, gold))


def grade_parsed(given: str, gold: str) -> bool:
    """math-verify's verdict on the contents of two boxes."""
    return verify(parse_boxed(gold), parse_boxed(undollar(given)), timeout_seconds=None)


def parse_boxed(content: str) -> list:
    # LaTeX only: the plain-number extraction would pick any number out of a box that it cannot read as a whole.
    return parse(f"{BOX}{content}}}", extraction_config=EXTRACTION, parsing_timeout=None)
