"""Data sets as they are published, to rows of ours: ``id``, ``problem``, ``answer``, ``source``.

One layout a data set. Which of several fields holds what differs between the copies that are about (``question`` or
``problem``), so a layout names them in order and the first that a row has counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vespo.samples.dataset import Duplicates, answer_text, problem_of
from megatron_vespo.samples.rows import DataError, field_of, read_rows

DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'
"""What DAPO-Math-17k says around each problem. It asks for another form than a box: left out."""


def without_instructions(problem: str) -> str:
    return problem.strip().removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()


def after_hashes(answer: str) -> str:
    """GSM8K's solution ends with ``#### 1,234``. Without hashes it is the number already."""
    return answer.rpartition("####")[2].strip().replace(",", "")


def same(text: str) -> str:
    return text.strip()


@dataclass(frozen=True, slots=True)
class Layout:
    what: str
    problems: tuple[str, ...] = ("problem", "question", "Problem")
    answers: tuple[str, ...] = ("answer", "Answer")
    ids: tuple[str, ...] = ("id", "unique_id", "ID")
    problem: Callable[[str], str] = same
    answer: Callable[[str], str] = same


LAYOUTS = {
    "dapo": Layout(
        "DAPO-Math-17k (each problem about a hundred times)",
        problems=("prompt",),
        answers=("reward_model.ground_truth",),
        ids=("extra_info.index",),
        problem=without_instructions,
    ),
    "aime24": Layout("AIME 2024"),
    "aime25": Layout("AIME 2025"),
    "amc23": Layout("AMC 12 2023"),
    "math500": Layout("MATH-500"),
    "gsm8k": Layout("GSM8K (the answer after ####)", answer=after_hashes),
}


@dataclass
class Prepared:
    """The rows, and what became of the others."""

    rows: list[dict[str, str]] = field(default_factory=list)
    read: int = 0
    duplicates: Duplicates = field(default_factory=Duplicates)
    refused: list[str] = field(default_factory=list)
    """Rows that cannot be used, each with the reason."""


def prepare(name: str, paths: list[Path]) -> Prepared:
    """The files in the layout called ``name``. Raises DataError where a file cannot be read."""
    layout, prepared = LAYOUTS[name], Prepared()
    ids: set[str] = set()
    for path in paths:
        for number, where, row in read_rows(path):
            prepared.read += 1
            try:
                problem = layout.problem(_text(row, layout.problems, where))
                answer_field = first_of(row, layout.answers)
                answer = layout.answer(answer_text(row, answer_field, where))
                if not problem or not answer:
                    raise DataError(f"{where}: the {'answer' if problem else 'problem'} is empty")
            except DataError as error:
                prepared.refused.append(str(error))
                continue
            if not prepared.duplicates.is_one(problem, answer, where):
                own = _id(row, layout.ids)
                wanted = f"{name}-{number if own is None else own}"
                unique = wanted if wanted not in ids else f"{wanted}-{prepared.read}"
                ids.add(unique)
                prepared.rows.append({"id": unique, "problem": problem, "answer": answer, "source": name})
    return prepared


def first_of(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """Of ``names``, the first that the row has a value for; the very first where it has none, for the message."""
    return next((name for name in names if _value(row, name) is not None), names[0])


def _value(row: dict[str, Any], name: str) -> Any:
    try:
        return field_of(row, name, "", setting="")
    except DataError:
        return None


def _text(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    problem = problem_of(row, first_of(row, names), where)
    return problem if isinstance(problem, str) else problem[-1]["content"]


def _id(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    values = (_value(row, name) for name in names)
    return next((str(value) for value in values if isinstance(value, str | int) and str(value)), None)
