"""Checkpoints x evaluation sets in one table: for the screen, as Markdown, and with every number as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from megatron_vespo.observe.accuracy import CONFIDENCE, Estimate, Summary
from megatron_vespo.observe.writer import finite

COLUMNS = ("checkpoint", "set", "problems", "k", "avg@k", "pass@k", "maj@k", "tokens", "truncated", "no answer")
INTERVAL = re.compile(r" \[(.+), (.+)\]")
NOTE = (
    f"Beside each accuracy its interval of {CONFIDENCE:.0%} over problems. tokens: of a response, mean. truncated: "
    "share of the responses that were cut at the length limit. no answer: share in which no boxed answer was found."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint on one set."""

    checkpoint: str
    path: str
    held_out: str
    left_out: int
    """Problems of the file that were not asked, their prompt being too long."""
    summary: Summary
    errors: int
    """Responses whose grading failed; they count as wrong."""

    def cells(self) -> list[str]:
        """As COLUMNS names them."""
        found = self.summary
        problems = f"{found.problems} of {found.problems + self.left_out}" if self.left_out else str(found.problems)
        return [
            self.checkpoint,
            self.held_out,
            problems,
            str(found.k),
            _shown(found.average),
            _shown(found.pass_at[found.k]),
            _shown(found.majority),
            f"{found.tokens:,.0f}",
            f"{found.truncated:.1%}",
            f"{found.unanswered:.1%}",
        ]


def screen(rows: Sequence[Row]) -> Table:
    """For a terminal: intervals on a line of their own and in two digits, so that 80 columns are enough."""
    table = Table(*COLUMNS[:-1], box=SIMPLE, padding=(0, 1, 0, 0), caption=NOTE, caption_justify="left")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(escape(INTERVAL.sub(_second_line, cell)) for cell in row.cells()[:-1]))
    return table


def _second_line(interval: re.Match[str]) -> str:
    return f"\n{float(interval[1]):.2f}–{float(interval[2]):.2f}"


def markdown(rows: Sequence[Row]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{NOTE}\n" + "".join(_warnings(rows))


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """``table.md`` and ``results.json``, which has pass@j for other j too."""
    (folder / "table.md").write_text(markdown(rows), encoding="utf-8")
    results: list[dict[str, Any]] = [finite(asdict(row)) for row in rows]
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _warnings(rows: Sequence[Row]) -> list[str]:
    return [
        f"\n{row.checkpoint} on {row.held_out}: the grading of {row.errors} responses failed; they count as wrong.\n"
        for row in rows
        if row.errors
    ]


def _shown(found: Estimate | None) -> str:
    return "–" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
