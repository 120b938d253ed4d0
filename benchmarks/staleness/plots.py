"""The study's two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.staleness.grid import LAGS, PAPER, REGIMES, SPLITS
from benchmarks.staleness.results import Outcome, chosen

COLOURS = dict(zip(PAPER, matplotlib.colormaps["tab10"].colors, strict=True))  # type: ignore[attr-defined]
DOTS_PER_INCH = 110


def draw_final(outcomes: Sequence[Outcome], file: Path) -> None:
    """Held-out avg@4 at the end against staleness, mean and range over seeds"""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for place, (title, regimes) in enumerate((("split into N mini-batches", SPLITS), ("constant lag", LAGS))):
        axes = figure.add_subplot(1, 2, place + 1)
        for method in PAPER:
            groups = [chosen(outcomes, method=method, regime=regime, precision="fp32") for regime in regimes]
            points = [(i, [o.final for o in group]) for i, group in enumerate(groups) if group]
            if points:
                _with_range(axes, points, method)
        axes.set_xticks(range(len(regimes)), [regime.lstrip("nlag") for regime in regimes])
        axes.set_xlabel(title)
        axes.set_ylabel("held-out avg@4")
        axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0] or figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(fontsize=8, ncols=2)
    _save(figure, file)


def _with_range(axes: Axes, points: Sequence[tuple[int, Sequence[float]]], method: str) -> None:
    places = [place for place, _ in points]
    axes.plot(places, [mean(values) for _, values in points], "o-", color=COLOURS[method], label=method, markersize=3)
    low, high = [min(values) for _, values in points], [max(values) for _, values in points]
    axes.fill_between(places, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)


def draw_curves(outcomes: Sequence[Outcome], file: Path) -> None:
    """Training reward against updates, a line a seed"""
    shown = [regime for regime in REGIMES if chosen(outcomes, regime=regime, precision="fp32")]
    columns = min(4, len(shown)) or 1
    rows = -(-len(shown) // columns) or 1
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows), layout="constrained")
    labels: dict[str, object] = {}
    for place, regime in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        for outcome in chosen(outcomes, regime=regime, precision="fp32"):
            if outcome.cell.method in COLOURS:
                updates, rewards = zip(*outcome.rewards, strict=True)
                (line,) = axes.plot(updates, rewards, color=COLOURS[outcome.cell.method], linewidth=1)
                labels[outcome.cell.method] = line
        axes.set_title(regime, fontsize=9)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=5, fontsize=8)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DOTS_PER_INCH)
