"""A record a problem: its responses' answers, grades and lengths, for whoever asks which problems were solved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_vespo.observe.accuracy import Answered, majority


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a set, and the k responses to it in the order of their sample index."""

    id: str
    gold: str
    responses: Sequence[Answered]

    def row(self) -> dict[str, Any]:
        return {
            "problem": self.id,
            "gold": self.gold,
            "k": len(self.responses),
            "grade": fmean(response.grade for response in self.responses),
            "right": sum(response.right for response in self.responses),
            "majority": majority(self.responses),
            "answers": [response.answer for response in self.responses],
            "grades": [response.grade for response in self.responses],
            "tokens": [response.tokens for response in self.responses],
            "finish": [response.finish for response in self.responses],
        }


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """JSONL; a file that is there is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = (json.dumps(problem.row(), ensure_ascii=False) + "\n" for problem in problems)
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
