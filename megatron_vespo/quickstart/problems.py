r"""Small arithmetic problems for the quickstart, and the demonstrations that its model is warmed up on.

A problem is an expression of two or three operations on small integers, put in symbols ("Compute 4*(9-6)."), in words
("What is 4 times the difference of 9 and 6?") or in a story ("Ann has 3 boxes with 4 red and 5 blue pens each. ...").

**What the demonstrations are.** They are the work of a hurried pupil, not of an expert. The pupil reads from left to
right and combines each number with the result so far, so that multiplication does not come first and parentheses are
overlooked: 7+5*3 becomes 7+5=12, 12*3=36. Only in a few demonstrations (``CAREFUL_SHARE``) does the pupil think of the
rules. A model trained on them copies both habits: it prefers the wrong one and knows the right one. It starts at an
accuracy near the share of problems that reading from left to right solves (``PLAIN_SHARE``). The rewards of the RL
run, and nothing else, tell it which habit is right.

Expressions, not only texts, are disjoint between the training problems, the held-out ones and the probe that stops
the warm-up: a hash of the expression says which of the three it may be used for.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout", "probe"]

PLAIN_SHARE = 0.2
"""Share of problems for which working from left to right is right."""
CAREFUL_SHARE = 0.25
"""Share of demonstrations that follow the rules of arithmetic."""
LARGEST_RESULT = 25
"""No intermediate result of either way of working exceeds this, and none is negative."""

MOST_REPEATS = 300
"""Draws in a row that give a known problem, after which there are taken to be no more."""

PLAIN_SHAPES = ("a*b+c", "a*b-c", "(a+b)*c")
TRAP_SHAPES = ("a+b*c", "a-b*c", "a*(b+c)", "a*(b-c)", "a-(b-c)", "a-(b+c)", "a+b*c-d")

STORIES = {
    "a*b-c": "{name} has {a} bags of {b} {things} and gives away {c}. How many are left?",
    "a*b+c": "{name} has {a} bags of {b} {things} and finds {c} more. How many now?",
    "a+b*c": "{name} has {a} {things} and buys {b} bags of {c}. How many now?",
    "a-b*c": "{name} has {a} {things} and gives {b} to each of {c} friends. How many are left?",
    "a*(b+c)": "{name} has {a} boxes with {b} red and {c} blue {things} each. How many in all?",
}
NAMES = ("Ann", "Ben", "Eva", "Tom")
THINGS = ("apples", "pens", "stones", "cards")
SYMBOL_QUESTIONS = ("Compute {expression}.", "{expression}=?")
WORD_QUESTIONS = ("What is {expression}?",)
OPERATION_WORDS = {"+": "plus", "-": "minus", "*": "times"}
PARENTHESES_WORDS = {"+": "the sum of {} and {}", "-": "the difference of {} and {}"}


@dataclass(frozen=True)
class Problem:
    id: str
    text: str
    expression: str
    """Such as ``3*(4+5)``: what the text asks for."""
    answer: str
    shape: str
    """The expression with letters for its numbers."""


@dataclass(frozen=True)
class Demonstration:
    problem: Problem
    response: str
    r"""The steps, then \boxed{result}."""
    careful: bool
    """Whether the pupil followed the rules of arithmetic."""


def make_problems(split: Split, count: int, seed: int) -> list[Problem]:
    """``count`` problems with different texts; the same for the same arguments on every machine."""
    rng = random.Random(f"{split}-{seed}")
    problems: dict[str, Problem] = {}
    repeats = 0
    while len(problems) < count:
        shape = rng.choice(PLAIN_SHAPES if rng.random() < PLAIN_SHARE else TRAP_SHAPES)
        numbers, expression = _draw_expression(shape, split, rng)
        text = _phrase(shape, expression, numbers, rng)
        if text in problems:
            repeats += 1
            if repeats > MOST_REPEATS:
                raise ValueError(f"count={count}: found only {len(problems)} different {split} problems; ask for fewer")
            continue
        repeats = 0
        answer = _results(careful_steps(expression))[-1]
        problems[text] = Problem(f"{split}-{len(problems)}", text, expression, str(answer), shape)
    return list(problems.values())


def make_demonstrations(problems: Sequence[Problem], seed: int, rounds: int = 1) -> list[Demonstration]:
    """The hurried pupil's work on each problem, in order; ``rounds`` times, careful each time by chance."""
    rng = random.Random(f"demonstrations-{seed}")
    demonstrations = []
    for problem in list(problems) * rounds:
        careful = rng.random() < CAREFUL_SHARE
        steps = careful_steps(problem.expression) if careful else hurried_steps(problem.expression)
        demonstrations.append(Demonstration(problem, write_response(steps), careful))
    return demonstrations


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """JSONL with the fields id, problem, answer, source: what a user's own file needs to hold."""
    rows = ({"id": p.id, "problem": p.text, "answer": p.answer, "source": f"quickstart {p.shape}"} for p in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_demonstrations(path: Path, demonstrations: Iterable[Demonstration]) -> None:
    """JSONL with the fields id, problem, response, careful."""
    rows = (
        {"id": d.problem.id, "problem": d.problem.text, "response": d.response, "careful": d.careful}
        for d in demonstrations
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def careful_steps(expression: str) -> list[str]:
    """Equations by the rules of arithmetic: parentheses, then products, then from left to right."""
    steps = []
    for pattern in (r"\((\d+)([+-])(\d+)\)", r"(\d+)(\*)(\d+)", r"^(\d+)([+-])(\d+)"):
        while match := re.search(pattern, expression):
            steps.append(_equation(*match.groups()))
            result = steps[-1].partition("=")[2]
            expression = expression[: match.start()] + result + expression[match.end() :]
    return steps


def hurried_steps(expression: str) -> list[str]:
    """Equations of someone who reads from left to right and sees neither parentheses nor precedence."""
    result, *rest = re.findall(r"\d+|[-+*]", expression)
    steps = []
    for operation, number in zip(rest[::2], rest[1::2], strict=True):
        steps.append(_equation(result, operation, number))
        result = steps[-1].partition("=")[2]
    return steps


def _equation(left: str, operation: str, right: str) -> str:
    a, b = int(left), int(right)
    result = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return f"{left}{operation}{right}={result}"


def write_response(steps: Sequence[str]) -> str:
    """The steps and the boxed result, as a pupil writes them down."""
    return ". ".join([*steps, rf"\boxed{{{_results(steps)[-1]}}}"])


def _results(steps: Sequence[str]) -> list[int]:
    return [int(step.partition("=")[2]) for step in steps]


def _draw_expression(shape: str, split: Split, rng: random.Random) -> tuple[dict[str, int], str]:
    """Drawn again until it suits, so that unsuitable numbers do not change how often a shape comes."""
    while True:
        numbers = _draw_numbers(shape, rng)
        expression = "".join(str(numbers.get(sign, sign)) for sign in shape)
        if _split_of(expression) == split and _is_usable(shape, expression):
            return numbers, expression


def _draw_numbers(shape: str, rng: random.Random) -> dict[str, int]:
    return {letter: rng.randint(*_range_of(letter, shape)) for letter in re.findall("[a-d]", shape)}


def _range_of(letter: str, shape: str) -> tuple[int, int]:
    """Small enough that a small model learns the tables: factors are smaller than what is added or subtracted."""
    if letter == "a" and shape.startswith("a-"):
        return 8, 20
    in_product = f"*{letter}" in shape or f"{letter}*" in shape or ("*" in shape and "(" in shape)
    return 2, 5 if in_product else 9


def _is_usable(shape: str, expression: str) -> bool:
    careful, hurried = _results(careful_steps(expression)), _results(hurried_steps(expression))
    in_range = all(0 <= result <= LARGEST_RESULT for result in careful + hurried)
    return in_range and (careful[-1] == hurried[-1]) == (shape in PLAIN_SHAPES)


def _phrase(shape: str, expression: str, numbers: dict[str, int], rng: random.Random) -> str:
    style = rng.choice(("symbols", "words", "story"))
    if style == "story" and shape in STORIES:
        return STORIES[shape].format(name=rng.choice(NAMES), things=rng.choice(THINGS), **numbers)
    if style == "symbols":
        return rng.choice(SYMBOL_QUESTIONS).format(expression=expression)
    return rng.choice(WORD_QUESTIONS).format(expression=_in_words(expression))


def _in_words(expression: str) -> str:
    def name_parentheses(match: re.Match[str]) -> str:
        left, operation, right = match.groups()
        return PARENTHESES_WORDS[operation].format(left, right)

    # Not at the start: "the sum of 2 and 7 times 6" could be either.
    spoken = re.sub(r"(?<!^)\((\d+)([+-])(\d+)\)", name_parentheses, expression)
    return re.sub(r"[-+*]", lambda operation: f" {OPERATION_WORDS[operation.group()]} ", spoken)


def _split_of(expression: str) -> Split:
    """A tenth of all expressions is held out, another tenth is for the probe."""
    bucket = hashlib.sha256(expression.encode()).digest()[0] % 10
    return "heldout" if bucket == 0 else "probe" if bucket == 1 else "train"
