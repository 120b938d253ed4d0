"""The study's pictures. Each function returns whether there was anything to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.staleness.grid import LAGS, METHODS, PAPER, PRECISIONS, REGIMES, REMEDIED, REMEDIES, SPLITS
from benchmarks.staleness.results import Outcome, chosen

COLOURS = dict(zip(PAPER, matplotlib.colormaps["tab10"].colors, strict=True))  # type: ignore[attr-defined]
DOTS_PER_INCH = 110


def draw_final(outcomes: Sequence[Outcome], file: Path) -> bool:
    """Held-out avg@4 at the end against staleness, engine in fp32: mean and range over seeds"""
    shown = chosen(outcomes, precision="fp32")
    sides = [("split into N mini-batches", SPLITS), ("constant lag", LAGS)]
    sides = [(title, regimes) for title, regimes in sides if any(o.cell.regime in regimes for o in shown)]
    if not sides:
        return False
    figure = Figure(figsize=(5 * len(sides), 4), layout="constrained")
    labels: dict[str, Artist] = {}
    for place, (title, regimes) in enumerate(sides):
        axes = figure.add_subplot(1, len(sides), place + 1)
        for method in PAPER:
            groups = [chosen(shown, method=method, regime=regime) for regime in regimes]
            points = [(i, [o.final for o in group]) for i, group in enumerate(groups) if group]
            if points:
                labels[method] = _with_range(axes, points, method)
        axes.set_xticks(range(len(regimes)), [regime.lstrip("nlag") for regime in regimes])
        axes.set_xlabel(title)
        axes.set_ylabel("held-out avg@4")
        axes.grid(alpha=0.3)
    _save(figure, labels, file)
    return True


def _with_range(axes: Axes, points: Sequence[tuple[int, Sequence[float]]], method: str) -> Artist:
    places = [place for place, _ in points]
    means = [mean(values) for _, values in points]
    (line,) = axes.plot(places, means, "o-", color=COLOURS[method], markersize=3)
    low, high = [min(values) for _, values in points], [max(values) for _, values in points]
    axes.fill_between(places, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
    return line


def draw_remedies(outcomes: Sequence[Outcome], file: Path) -> bool:
    """Training reward of the last quarter where the remedies are tried: a dot a seed, a bar at the mean"""
    shown = [place for place in REMEDIED if any(o.cell.method in REMEDIES for o in _cells_at(outcomes, place))]
    if not shown:
        return False
    methods = [method for method in METHODS if any(chosen(_cells_at(outcomes, p), method=method) for p in shown)]
    figure = Figure(figsize=(3.2 * len(shown) + 1.2, 0.24 * len(methods) + 1.2), layout="constrained")
    for column, place in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), column + 1)
        for row, method in enumerate(methods):
            rewards = [o.late_reward for o in chosen(_cells_at(outcomes, place), method=method)]
            axes.plot(rewards, [row] * len(rewards), "o", color=COLOURS.get(method, "black"), markersize=4)
            if rewards:
                axes.plot(mean(rewards), row, "|", color=COLOURS.get(method, "black"), markersize=14)
        axes.set_yticks(range(len(methods)), methods if column == 0 else [], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(" ".join(place), fontsize=9)
        axes.grid(alpha=0.3)
    _save(figure, {}, file)
    return True


def draw_curves(outcomes: Sequence[Outcome], file: Path) -> bool:
    """Training reward against updates, a line a seed"""
    places = [(regime, precision) for precision in PRECISIONS for regime in REGIMES]
    shown = [place for place in places if _cells_at(outcomes, place)]
    if not shown:
        return False
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.6), layout="constrained")
    labels: dict[str, Artist] = {}
    for number, place in enumerate(shown):
        axes = figure.add_subplot(rows, columns, number + 1)
        for outcome in _cells_at(outcomes, place):
            if outcome.cell.method in COLOURS:
                updates, rewards = zip(*outcome.rewards, strict=True)
                (line,) = axes.plot(updates, rewards, color=COLOURS[outcome.cell.method], linewidth=1)
                labels[outcome.cell.method] = line
        axes.set_title(" ".join(place), fontsize=9)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    _save(figure, labels, file)
    return True


def _cells_at(outcomes: Sequence[Outcome], place: tuple[str, str]) -> list[Outcome]:
    regime, precision = place
    return chosen(outcomes, regime=regime, precision=precision)


def _save(figure: Figure, labels: dict[str, Artist], file: Path) -> None:
    if labels:
        figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=5, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DOTS_PER_INCH)
