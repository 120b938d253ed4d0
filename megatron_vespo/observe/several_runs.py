"""Several runs side by side: a table and curves, as the paper compares objectives and degrees of staleness."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import yaml

from megatron_vespo.observe.canvas import SERIES, add_legend, new_figure, styled, to_svg
from megatron_vespo.observe.markup import cell, document, figure, grid, heading, section
from megatron_vespo.observe.records import number, read_records

CURVES = (
    ("reward", "Reward of the rollouts"),
    ("accuracy", "Accuracy of the rollouts"),
    ("staleness_mean", "Staleness, updates"),
    ("grad_norm", "Gradient norm"),
    ("entropy", "Entropy"),
    ("response_length", "Response length, tokens"),
)
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Row:
    """One run. None: it has no such number."""

    run: str
    objective: str
    mode: str
    mini_batches: int
    """N."""
    updates: int
    before: float | None
    """Held-out accuracy: avg@k at the first evaluation, the best, and the last."""
    best: float | None
    last: float | None
    reward: float | None
    """Of the last step, as what follows."""
    staleness: float | None
    largest_gradient: float | None
    """Gradient norm, over all steps."""


@dataclass(frozen=True)
class _Run:
    row: Row
    records: list[dict[str, Any]]


def write_several(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """runs.html and runs.csv in ``folder``. Raises ValueError where two directories have one name."""
    runs = [_read(path, name) for path, name in zip(run_dirs, _names(run_dirs), strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "runs.csv", folder / "runs.html"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(run.row) for run in runs)
    page.write_text(_page(runs), encoding="utf-8")
    return [page, table]


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    paths = [path.resolve() for path in run_dirs]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run directory is given twice")


def _read(path: Path, name: str) -> _Run:
    config = yaml.safe_load((path / "config.resolved.yaml").read_text(encoding="utf-8"))
    records = read_records(path / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    scores = [score for _, score in _scores(records)]
    norms = [norm for step in steps if (norm := number(step, "grad_norm")) is not None]
    row = Row(
        run=name,
        objective=config["objective"]["name"],
        mode=config["train"]["mode"],
        mini_batches=config["train"]["mini_batches"],
        updates=max((int(record.get("version", 0)) for record in records), default=0),
        before=scores[0] if scores else None,
        best=max(scores, default=None),
        last=scores[-1] if scores else None,
        reward=number(steps[-1], "reward") if steps else None,
        staleness=number(steps[-1], "staleness_mean") if steps else None,
        largest_gradient=max(norms, default=None),
    )
    return _Run(row, records)


def _scores(records: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(updates, avg@k) of every evaluation."""
    return [
        (int(record.get("version", 0)), float(value))
        for record in records
        for name, value in (record.get("eval") or {}).items()
        if name.startswith("avg@") and isinstance(value, int | float)
    ]


def _page(runs: Sequence[_Run]) -> str:
    scores = [(run.row.run, _scores(run.records)) for run in runs]
    figures = [_figure("Held-out accuracy, avg@k", scores)]
    for name, title in CURVES:
        lines = [(run.row.run, [(int(r["version"]), v) for r, v in _values(run, name)]) for run in runs]
        figures.append(_figure(title, lines))
    parts = [
        heading("Runs", [("runs", len(runs))]),
        section("Figures of each run", _table(runs)),
        section("Over optimizer updates", grid([part for part in figures if part])),
    ]
    return document("Runs", parts)


def _values(run: _Run, name: str) -> list[tuple[dict[str, Any], float]]:
    return [(r, v) for r in run.records if "version" in r and (v := number(r, name)) is not None]


def _table(runs: Sequence[_Run]) -> str:
    names = [field.name for field in fields(Row)]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    rows = []
    for run in sorted(runs, key=lambda run: (run.row.mode, run.row.mini_batches, run.row.objective)):
        cells = [escape(v) if isinstance(v, str) else cell(v, ".4g") for v in asdict(run.row).values()]
        rows.append(f"<tr>{''.join(f'<td>{text}</td>' for text in cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _figure(title: str, lines: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """'' where no run has a point."""
    if not any(points for _, points in lines):
        return ""
    with styled():
        canvas, axes = new_figure("update")
        for place, (name, points) in enumerate(lines):
            if points:
                style = STYLES[place // len(SERIES) % len(STYLES)]
                axes.plot(*zip(*points, strict=True), style, label=name, color=SERIES[place % len(SERIES)])
        add_legend(canvas, axes)
        return figure(title, "", to_svg(canvas))
