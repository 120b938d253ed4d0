"""The page of the study: its tables and plots from the cells that are done, below what a person wrote of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.staleness.grid import (
    LEARNING_RATE,
    METHODS,
    PAPER,
    PRECISIONS,
    PROMPTS_PER_UPDATE,
    REGIMES,
    REMEDIED,
    REMEDIES,
    SAMPLES_PER_PROMPT,
    UPDATES,
    Cell,
)
from benchmarks.staleness.plots import draw_curves, draw_final, draw_remedies
from benchmarks.staleness.results import ENOUGH, SURE, Outcome, chosen, difference, spread

MARK = "<!-- What follows is written by `make study`; what stands above is kept. -->"
HEADER = """# The staleness study

"""
BROKEN = "†"


def write_page(page: Path, suite: str, outcomes: Sequence[Outcome], left: int) -> None:
    written = page.read_text().partition(MARK)[0] if page.is_file() else HEADER
    images = page.parent / "images"
    parts = [MARK, "", *_about(suite, outcomes, left)]
    if outcomes:
        parts += _accuracy(outcomes) + _rewards(outcomes) + _precisions(outcomes) + _remedies(outcomes)
        parts += _against_vespo(outcomes) + _breaking(outcomes) + _lengths(outcomes)
        parts += ["## Plots", ""]
    for draw in (draw_final, draw_remedies, draw_curves):
        picture = images / f"{page.stem}_{draw.__name__.removeprefix('draw_')}.png"
        if draw(outcomes, picture):
            parts += [f"![{draw.__doc__}](images/{picture.name})", ""]
    page.write_text(written + "\n".join(parts).rstrip() + "\n")


def _about(suite: str, outcomes: Sequence[Outcome], left: int) -> list[str]:
    seeds = sorted({o.cell.seed for o in outcomes})
    lines = [
        "## Tables",
        "",
        f"Made by `python -m benchmarks.staleness --suite {suite}` from {len(outcomes)} cells, seeds {seeds}"
        + (f"; {left} cells of the suite are not there yet." if left else "."),
        f"Each cell makes {UPDATES} updates of {PROMPTS_PER_UPDATE} prompts x {SAMPLES_PER_PROMPT} responses (Adam, "
        f"rate {LEARNING_RATE:g}, constant), token-mean aggregation and the same advantages for all; 5 evaluations on "
        "128 held-out problems, and the last one counts, not the best. ± is the standard deviation over seeds; a "
        f"number without it is of one seed; · is a cell that has not been run. {BROKEN}: at least one seed ended worse "
        "than it began.",
        "",
    ]
    return lines


def _table(title: str, rows: Sequence[str], columns: Sequence[str], value: Callable[[str, str], str]) -> list[str]:
    """Rows and columns without any value are left out."""
    filled = {(row, column): value(row, column) for row in rows for column in columns}
    rows = [row for row in rows if any(filled[row, column] != "·" for column in columns)]
    columns = [column for column in columns if any(filled[row, column] != "·" for row in rows)]
    if not rows:
        return []
    lines = [f"### {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(filled[row, column] for column in columns) + " |" for row in rows]
    return [*lines, ""]


def _final(outcomes: Sequence[Outcome]) -> str:
    text = spread(o.final for o in outcomes)
    return text + (f" {BROKEN}" if any(o.broken for o in outcomes) else "")


def _accuracy(outcomes: Sequence[Outcome]) -> list[str]:
    start = mean(o.start for o in outcomes)
    return _table(
        f"Held-out avg@4 at the end (start: {start:.2f}), engine in fp32",
        PAPER,
        REGIMES,
        lambda method, regime: _final(chosen(outcomes, method=method, regime=regime, precision="fp32")),
    )


def _rewards(outcomes: Sequence[Outcome]) -> list[str]:
    return _table(
        "Training reward, mean of the last quarter of the updates, engine in fp32",
        PAPER,
        REGIMES,
        lambda method, regime: spread(
            o.late_reward for o in chosen(outcomes, method=method, regime=regime, precision="fp32")
        ),
    )


def _precisions(outcomes: Sequence[Outcome]) -> list[str]:
    if not any(o.cell.precision != "fp32" for o in outcomes):
        return []
    columns = [f"{regime} {precision}" for regime in ("n8", "async") for precision in PRECISIONS]
    return _final_table("Held-out avg@4 at the end, by the engine's precision", outcomes, PAPER, columns)


def _remedies(outcomes: Sequence[Outcome]) -> list[str]:
    if not any(o.cell.method in REMEDIES for o in outcomes):
        return []
    columns = [f"{regime} {precision}" for regime, precision in REMEDIED]
    rows = ("vespo", "respo", "topr", *REMEDIES)
    return _final_table("Held-out avg@4 at the end: remedies", outcomes, rows, columns)


def _final_table(title: str, outcomes: Sequence[Outcome], rows: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Methods against columns that name staleness and precision."""

    def value(method: str, column: str) -> str:
        regime, precision = column.split()
        return _final(chosen(outcomes, method=method, regime=regime, precision=precision))

    return _table(title, rows, columns, value)


SITUATIONS: dict[str, Callable[[Cell], bool]] = {
    "old data: N or lag of 16 and more": lambda cell: cell.precision == "fp32" and cell.regime in OLD,
    "asynchronous": lambda cell: cell.regime == "async",
    "engine in fp8": lambda cell: cell.precision == "fp8",
}
OLD = ("n16", "n32", "n64", "lag64", "lag256")


MEASURES: dict[str, Callable[[Outcome], float]] = {
    "Held-out avg@4 at the end": lambda outcome: outcome.final,
    "Training reward of the last quarter": lambda outcome: outcome.late_reward,
}


def _against_vespo(outcomes: Sequence[Outcome]) -> list[str]:
    """Cell by cell, since seeds and situations differ more than methods do."""
    rivals = {(o.cell.seed, o.cell.regime, o.cell.precision): o for o in outcomes if o.cell.method == "vespo"}
    lines: list[str] = []
    for title, measure in MEASURES.items():

        def value(method: str, situation: str, measure: Callable[[Outcome], float] = measure) -> str:
            mine = [o for o in outcomes if o.cell.method == method and SITUATIONS[situation](o.cell)]
            pairs = [(o, rivals.get((o.cell.seed, o.cell.regime, o.cell.precision))) for o in mine]
            return difference([measure(o) - measure(rival) for o, rival in pairs if rival is not None])

        others = [method for method in METHODS if method != "vespo"]
        lines += _table(f"{title}, less that of vespo in the same cell", others, list(SITUATIONS), value)
    note = (
        "Mean over cells of the same seed, staleness and precision ± its standard error, and how many cells; **bold** "
        f"where it is more than {SURE:g} standard errors from 0 in at least {ENOUGH} cells. One in twenty would "
        "be bold by chance. The training reward is that of the weights that sampled, in some 4,000 responses to "
        "problems never seen before, where the held-out score has 512: it tells smaller differences."
    )
    return [*lines, note, ""] if lines else []


def _breaking(outcomes: Sequence[Outcome]) -> list[str]:
    broken = sorted((o for o in outcomes if o.broken), key=lambda o: (o.cell.method, o.cell.regime, o.cell))
    if not broken:
        return ["### Where a method broke", "", "Nowhere: every cell ended better than it began.", ""]
    lines = [
        "### Where a method broke",
        "",
        "Below half of its best training reward for good from the update named on (–: it sank without that). "
        "Entropy (nats a token), response length (tokens) and gradient norm: means of the first and the last eighth.",
        "",
        "| cell | from update | best → end | entropy | length | gradient norm |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in broken:
        cells = [
            f"{a:.3g} → {b:.3g}" for a, b in map(outcome.before_and_after, ("entropy", "response_length", "grad_norm"))
        ]
        at = outcome.broke_at
        lines.append(
            f"| {outcome.cell.name} | {'–' if at is None else at} | {outcome.best:.2f} → {outcome.final:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    return [*lines, ""]


def _lengths(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "### What is left of long responses",
        "",
        "Of the last quarter of the updates: mean coefficient phi (1 on policy) of the shortest and of the longest "
        "quarter of the responses, by sign of the advantage, and the effective sample size of phi in them.",
        "",
        "| method, staleness | tokens | phi, A > 0 | phi, A < 0 | ESS of phi |",
        "|---|---|---|---|---|",
    ]
    places = (("n64", "fp32"), ("lag64", "fp32"), ("async", "fp8"))
    for regime, precision in places:
        for method in (*PAPER, *REMEDIES):
            found = [o.phi_by_length for o in chosen(outcomes, method=method, regime=regime, precision=precision)]
            ends = [(quarters[0], quarters[-1]) for quarters in found if len(quarters) > 1]
            if ends:
                row = [_ends(ends, name, form) for name, form in LENGTH_COLUMNS]
                lines.append(f"| {method}, {regime} {precision} | " + " | ".join(row) + " |")
    return [*lines, ""] if lines[-1][:2] != "|-" else []


LENGTH_COLUMNS = (("tokens", ".0f"), ("phi_positive", ".2f"), ("phi_negative", ".2f"), ("ess_phi", ".2f"))


def _ends(ends: Sequence[tuple[dict[str, float], dict[str, float]]], name: str, form: str) -> str:
    shortest = [first[name] for first, _ in ends if name in first]
    longest = [last[name] for _, last in ends if name in last]
    if not shortest or not longest:
        return "·"
    return f"{mean(shortest):{form}} → {mean(longest):{form}}"
