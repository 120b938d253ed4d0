"""The plots of a comparison of objectives, in the style of plots.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_vespo.observe.canvas import INK, SERIES, add_legend, styled, to_svg
from megatron_vespo.observe.comparison import Comparison, Response

POSITIVE, NEGATIVE = SERIES[0], SERIES[1]
COLUMNS = 5
POINTS_SHOWN = 300
"""Of each sign in each small plot: spread evenly over log W, both ends among them."""
PHI_SHOWN = (-0.15, 2.5)


def draw_phi(comparison: Comparison) -> str:
    """phi over log W, a small plot an objective: the responses as points, and its curve."""
    labels = comparison.labels
    rows = -(-len(labels) // COLUMNS)
    low, high = comparison.curves[labels[0]].log_w[0], comparison.curves[labels[0]].log_w[-1]
    chosen = [
        spread_out([r for r in comparison.responses if r.advantage * sign > 0], lambda r: _log_w(comparison, r))
        for sign in (1, -1)
    ]
    with styled():
        figure = Figure(figsize=(11.6, 1.9 * rows + 0.6), layout="constrained")
        panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, label in zip(panels, labels, strict=False):
            curve = comparison.curves[label]
            for responses, y, color, name in zip(
                chosen, (curve.positive, curve.negative), (POSITIVE, NEGATIVE), ("A > 0", "A < 0"), strict=True
            ):
                axes.plot(curve.log_w, np.clip(y, *PHI_SHOWN), color=color, linewidth=1.1, alpha=0.55)
                x = np.clip([_log_w(comparison, r) for r in responses], low, high)
                phi = np.clip([r.phi[label] for r in responses], *PHI_SHOWN)
                axes.plot(x, phi, ".", color=color, markersize=3.5, alpha=0.6, label=name, clip_on=False)
            axes.set_title(label, fontsize=9, color=INK, pad=3)
            axes.set_ylim(*PHI_SHOWN)
            axes.set_xlim(low, high)
            axes.tick_params(length=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        for axes in panels[len(labels) :]:
            axes.set_axis_off()
        for axes in panels[max(0, len(labels) - COLUMNS) : len(labels)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("log W" if comparison.engine_inside else "log W, stale part")
        add_legend(figure, panels[0])
        return to_svg(figure)


def _log_w(comparison: Comparison, response: Response) -> float:
    """Of the ratio that the objectives see."""
    return response.log_w_stale + (response.log_w_engine if comparison.engine_inside else 0.0)


def spread_out(responses: Sequence[Response], key: Callable[[Response], float]) -> list[Response]:
    """At most POINTS_SHOWN of them, by ``key``."""
    ordered = sorted(responses, key=key)
    if len(ordered) <= POINTS_SHOWN:
        return ordered
    return [ordered[i] for i in np.linspace(0, len(ordered) - 1, POINTS_SHOWN).round().astype(int)]


def draw_thrown_away(comparison: Comparison) -> str:
    """Shares of thrown-away responses by sign of A, two bars an objective."""
    summaries = comparison.whole.objectives
    with styled():
        figure, axes, y = _rows(comparison.labels)
        for shift, color, name in ((-0.19, POSITIVE, "positive"), (0.19, NEGATIVE, "negative")):
            values = [getattr(s, f"thrown_away_{name}") for s in summaries.values()]
            axes.barh(y + shift, values, height=0.36, color=color, label="A > 0" if name == "positive" else "A < 0")
            for at, value in zip(y + shift, values, strict=True):
                if value > 0:
                    axes.text(value, at, f" {value:.0%}" if value >= 0.01 else " < 1%", va="center", fontsize=7.5)
        seen = [v for s in summaries.values() for v in (s.thrown_away_positive, s.thrown_away_negative) if v == v]
        axes.set_xlim(0, max([0.05, *seen]) * 1.12)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        add_legend(figure, axes)
        return to_svg(figure)


def draw_by_length(comparison: Comparison) -> str:
    """Parts of the gradient's weight by length, a stacked bar an objective; dashed: the same of the tokens."""
    whole = comparison.whole
    edges = [math.floor(edge) for edge in whole.length_edges if edge == edge] or [0, 0, 0]
    lows = [1, *(edge + 1 for edge in edges)]
    with styled():
        figure, axes, y = _rows(comparison.labels)
        left = np.zeros(len(y))
        for i, low in enumerate(lows):
            if whole.tokens_by_length[i] == 0:  # lengths that many share leave a quarter without any
                continue
            name = f"{low} to {edges[i]}" if i < 3 else f"{low} tokens or more"
            parts = np.nan_to_num([s.by_length[i] for s in whole.objectives.values()])
            axes.barh(y, parts, left=left, height=0.7, color=SERIES[2], alpha=0.25 + 0.25 * i, linewidth=0, label=name)
            left = left + parts
        for at in np.cumsum(whole.tokens_by_length)[:-1]:
            axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        add_legend(figure, axes)
        return to_svg(figure)


def _rows(labels: Sequence[str]) -> tuple[Figure, Axes, np.ndarray]:
    """Axes with a row for each label, the first on top."""
    figure = Figure(figsize=(5.4, 0.27 * len(labels) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    y = np.arange(len(labels))
    axes.set_yticks(y, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(length=0)
    return figure, axes, y
