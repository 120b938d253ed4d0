"""The report's plots of stored rollouts: what an objective makes of responses of which length, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_vespo.objectives.budget import predict
from megatron_vespo.observe.canvas import INK, SERIES, add_legend, new_figure, styled, to_svg
from megatron_vespo.observe.run_budget import BudgetRow, PhiOf
from megatron_vespo.observe.weight_health import length_bins
from megatron_vespo.samples.weight_table import WeightTable

BINS = 8
DOTS = 400
"""Responses drawn one by one, at most."""
CURVE = 24
"""Lengths at which a prediction is drawn."""
BARS: dict[str, Any] = dict(marker="o", markersize=4, elinewidth=1.2)
RESAMPLED: dict[str, Any] = dict(marker="D", markersize=5, markerfacecolor="none", linestyle="none")


def draw_phi_against_length(table: WeightTable) -> str | None:
    """phi of each response, and its means over ranges of lengths: whole, stale, engine; None without a response.

    table: counted responses of one sign of the advantage.
    """
    table = table.rows(np.isfinite(table.phi + table.phi_stale + table.phi_engine))
    if not len(table):
        return None
    with styled():
        figure, axes = new_figure("tokens in the response")
        some = np.random.default_rng(0).permutation(len(table))[:DOTS]
        axes.scatter(table.lengths[some], table.phi[some], s=5, color=INK, alpha=0.35, linewidth=0)
        bins = length_bins(table.lengths, BINS)
        x = [table.lengths[members].mean() for members in bins]
        reach = [1.0]
        for (part, label), color in zip((("", "φ"), ("_stale", "stale"), ("_engine", "engine")), SERIES, strict=False):
            phi = getattr(table, f"phi{part}")
            means = np.array([phi[members].mean() for members in bins])
            errors = np.array([phi[members].std() / len(members) ** 0.5 for members in bins])
            axes.errorbar(x, means, errors, color=color, label=label, **BARS)
            reach += [*(means - errors), *(means + errors)]
        # The means decide: a single response of W = 1000 must not flatten the rest.
        axes.set_ylim(min(0.0, 1.2 * min(reach)), 1.2 * max(reach))
        _finish(axes)
        add_legend(figure, axes)
        return to_svg(figure)


def draw_spread(rows: Sequence[BudgetRow], k3: float) -> str:
    """Standard deviation of log W_engine against length: predicted, resampled, measured."""
    measured, resampled = ([row for row in rows if row.source == source] for source in ("measured", "resampled"))
    with styled():
        figure, axes = new_figure("tokens in the response")
        x = _lengths(measured)
        axes.plot(x, np.sqrt(2 * k3 * x), color=SERIES[2], label="normal: √(2 k3 T)")
        axes.plot(
            [row.length for row in resampled],
            [row.deviation for row in resampled],
            color=SERIES[2],
            label="resampled",
            **RESAMPLED,
        )
        ends = [(row.deviation, row.deviation_ends or (row.deviation, row.deviation)) for row in measured]
        _bars(axes, measured, ends, SERIES[2], "measured")
        axes.set_ylim(bottom=0.0)
        _finish(axes)
        add_legend(figure, axes)
        return to_svg(figure)


def draw_signal(rows: Sequence[BudgetRow], phi: PhiOf, k3: float) -> str:
    """E phi under W_engine against length, for either sign of the advantage: predicted, resampled, measured."""
    measured, resampled = ([row for row in rows if row.source == source] for source in ("measured", "resampled"))
    with styled():
        figure, axes = new_figure("tokens in the response")
        x = _lengths(measured)
        for sign, (label, color) in enumerate((("A ≥ 0", SERIES[0]), ("A < 0", SERIES[1]))):
            curve = [predict(phi(length, sign == 0), k3, length).mean_phi for length in x]
            axes.plot(x, curve, color=color, label=f"{label}, normal")
            means = [row.signs[sign].mean_phi for row in resampled if row.signs]
            axes.plot([row.length for row in resampled], means, color=color, **RESAMPLED)
            ends = [
                (row.signs[sign].mean_phi, (row.sign_ends[sign][0].mean_phi, row.sign_ends[sign][1].mean_phi))
                for row in measured
                if row.signs and row.sign_ends
            ]
            _bars(axes, measured, ends, color)
        # In the legend, the markers of both signs at once.
        axes.plot([], color=INK, label="resampled", **RESAMPLED)
        axes.errorbar([], [], [], color=INK, label="measured", linestyle="none", **BARS)
        axes.set_ylim(0.0, max(1.1, axes.get_ylim()[1]))
        _finish(axes)
        add_legend(figure, axes)
        return to_svg(figure)


def _bars(
    axes: Axes,
    rows: Sequence[BudgetRow],
    ends: Sequence[tuple[float, tuple[float, float]]],
    color: str,
    label: str | None = None,
) -> None:
    values = np.array([value for value, _ in ends])
    # The interval of a skewed sample need not hold its value; a bar of negative length is refused.
    below = [max(0.0, value - low) for value, (low, _) in ends]
    above = [max(0.0, high - value) for value, (_, high) in ends]
    axes.errorbar(
        [row.length for row in rows], values, [below, above], color=color, label=label, linestyle="none", **BARS
    )


def _lengths(rows: Sequence[BudgetRow]) -> np.ndarray:
    return np.linspace(min(row.shortest for row in rows), max(row.longest for row in rows), CURVE)


def _finish(axes: Axes) -> None:
    """A single length gets room on both sides."""
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim(low - 1, high + 1)
