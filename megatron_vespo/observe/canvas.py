"""The canvas of the report's plots: inline SVG whose colours are CSS variables, so that they follow the page.

Everything is drawn in placeholder colours, which are replaced by ``var(--...)`` in the SVG text; report.css gives the
variables their values for light and dark.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GRID = "#010203", "#010204"
SERIES = tuple(f"#0102{16 + i:02x}" for i in range(8))
CSS_NAMES = {INK: "var(--muted)", GRID: "var(--line)"} | {color: f"var(--series-{i})" for i, color in enumerate(SERIES)}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


def styled() -> Any:
    """``with styled(): ...`` around everything that is drawn."""
    return matplotlib.rc_context(STYLE)


def new_figure(x_label: str = "step") -> tuple[Figure, Axes]:
    """Axes over whole numbers."""
    figure = Figure(figsize=(5.4, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.tick_params(length=0)
    axes.margins(x=0.02)
    return figure, axes


def add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, handlelength=1.2, columnspacing=1.2, borderpad=0)


def to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Inside HTML neither namespace needs its address, and the page promises to name none.
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg\s[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    for color, name in CSS_NAMES.items():
        svg = svg.replace(color, name)
    return svg
