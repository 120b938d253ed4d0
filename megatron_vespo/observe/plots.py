"""The report's plots: matplotlib drawings as inline SVG whose colours are CSS variables, so that they follow the page.

Each panel is drawn in placeholder colours, which are replaced by ``var(--...)`` in the SVG text; report.css gives the
variables their values for light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_vespo.observe.records import Record, number

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


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of one or more quantities of a step record over the steps."""

    title: str
    note: str
    """What it shows and how to read it, in a sentence."""
    series: tuple[tuple[str, str], ...]
    """(record key, label)."""
    log: bool = False
    reference: float | None = None
    """A value to compare with, drawn as a dashed line."""
    floor: float | None = None
    """The axis shows at least down to this value."""
    evaluations: bool = False
    """Mark the evaluation records' scores."""
    only_if_varying: bool = False
    """Leave the panel out where its quantity is the same at every step."""


LEARNING = (
    Panel(
        *(
            "Reward and accuracy",
            "Training rollouts (lines, smoothed over a faint trace) and held-out problems (dots).",
        ),
        *((("reward", "reward"), ("accuracy", "accuracy")),),
        floor=0.0,
        evaluations=True,
    ),
    Panel(
        *("Response length", "Mean tokens of a sampled response."),
        *((("response_length", "tokens"),),),
        floor=0.0,
    ),
    Panel("Truncated responses", "Share cut at the length limit.", (("truncated", "truncated"),), floor=0.0),
    Panel("Entropy", "Mean entropy of the policy per token, in nats.", (("entropy", "entropy"),), floor=0.0),
)
OFF_POLICY = (
    Panel(
        *("Sequence weight W", "Mean of W = π/μ over responses; 1 on policy, and in expectation over μ."),
        *((("w/mean", "mean W"),),),
        reference=1.0,
    ),
    Panel(
        *("Effective sample size", "(ΣW)² / (n ΣW²): the share of responses that still carry weight."),
        *((("w/ess", "ESS / n"),),),
        reference=1.0,
        floor=0.0,
    ),
    Panel(
        *("log W, split", "Mean log W of the stale part (trainer now against trainer then) and of the engine's part."),
        *((("log_w_stale/mean", "stale"), ("log_w_engine/mean", "engine")),),
        reference=0.0,
    ),
    Panel(
        *("Trainer against engine", "Per token, same weights: mean |Δ log p|, and the k3 estimate of KL."),
        *((("rollout_logprob_diff", "|Δ log p|"), ("k3_engine", "k3")),),
        log=True,
    ),
    Panel(
        *("Staleness", "Weight version trained minus version that sampled, per token."),
        *((("staleness_mean", "mean"), ("staleness_max", "maximum")),),
        floor=0.0,
    ),
    Panel(
        *("Weight-sync probe", "Largest |engine − trainer| log-prob on fixed prompts, right after a sync."),
        *((("sync_probe_max", "maximum"),),),
        log=True,
    ),
)
OPTIMISATION = (
    Panel("Gradient norm", "Before clipping.", (("grad_norm", "gradient norm"),), floor=0.0),
    Panel("Loss", "The objective's surrogate; its level has no meaning by itself.", (("loss", "loss"),), reference=0.0),
    Panel("Learning rate", "As scheduled.", (("lr", "learning rate"),), floor=0.0, only_if_varying=True),
)
THROUGHPUT = (Panel("Throughput", "Trained tokens a second.", (("tokens_per_s", "tokens/s"),), floor=0.0),)


def draw(panel: Panel, steps: Sequence[Record], evaluations: Sequence[Record]) -> str | None:
    """The panel as SVG text, or None if the records have none of its quantities."""
    x = np.array([record["step"] for record in steps])
    curves = _curves(panel, steps)
    scores = _scores(evaluations) if panel.evaluations else {}
    if not curves and not scores:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        colors = iter(SERIES * 4)
        for label, y in curves.items():
            _draw_curve(axes, x, y, label, next(colors))
        for name, points in scores.items():
            label = f"held-out {name}"
            size = 5 if len(points) <= 20 else 2.5
            line = axes.plot(*zip(*points, strict=True), color=next(colors), label=label, marker="o", markersize=size)
            line[0].set(linestyle=(0, (1, 2)), clip_on=False)
        if panel.log and any((y > 0).any() for y in curves.values()):
            axes.set_yscale("log", nonpositive="mask")
        if panel.reference is not None:
            axes.axhline(panel.reference, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if panel.floor is not None:
            seen = np.concatenate([*curves.values(), *(np.array([v for _, v in points]) for points in scores.values())])
            low, high = axes.get_ylim()
            bottom = panel.floor if np.nanmin(seen) >= panel.floor else low
            axes.set_ylim(bottom, high if np.nanmax(seen) > panel.floor else panel.floor + 1)
        low, high = axes.get_xlim()
        if high - low < 1:
            axes.set_xlim(low - 1, high + 1)
        if len(curves) + len(scores) > 1:
            legend(figure, axes)
        return svg_text(figure)


def _curves(panel: Panel, steps: Sequence[Record]) -> dict[str, np.ndarray]:
    """Label -> [steps] values, NaN where missing; a quantity equal to an earlier one (accuracy = reward) shares it."""
    curves: dict[str, np.ndarray] = {}
    for key, label in panel.series:
        values = [number(record, key) for record in steps]
        y = np.array([math.nan if value is None else value for value in values])
        if not np.isfinite(y).any() or (panel.only_if_varying and np.nanmin(y) == np.nanmax(y)):
            continue
        twin = next((name for name, other in curves.items() if np.array_equal(y, other, equal_nan=True)), None)
        if twin is not None:
            del curves[twin]
            label = f"{twin} = {label}"
        curves[label] = y
    return curves


def _scores(evaluations: Sequence[Record]) -> dict[str, list[tuple[int, float]]]:
    """Score name -> its (step, value) points."""
    scores: dict[str, list[tuple[int, float]]] = {}
    for record in evaluations:
        for name, value in record["eval"].items():
            if name != "n" and isinstance(value, int | float):
                scores.setdefault(name, []).append((record["step"], value))
    return scores


def draw_seconds(steps: Sequence[Record]) -> str | None:
    """Seconds by phase, stacked, over the steps; None if no record has any."""
    rows = [(record["step"], record["seconds"]) for record in steps if record.get("seconds")]
    if not rows:
        return None
    phases = list(dict.fromkeys(phase for _, seconds in rows for phase in seconds))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        # One outline a phase, a plateau a step: as bars, 1,500 steps would be 7,500 rectangles.
        edges = np.array([rows[0][0], *(step + 1 for step, _ in rows)]) - 0.5
        bottom = np.zeros(len(edges))
        for phase, color in zip(phases, SERIES * len(phases), strict=False):
            heights = [seconds.get(phase) or 0.0 for _, seconds in rows]
            top = bottom + np.array([*heights, heights[-1]])
            axes.fill_between(edges, bottom, top, step="post", color=color, label=phase, linewidth=0)
            bottom = top
        axes.set_ylabel("seconds a step")
        legend(figure, axes)
        return svg_text(figure)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.tick_params(length=0)
    axes.margins(x=0.02)
    return figure, axes


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, handlelength=1.2, columnspacing=1.2, borderpad=0)


def _draw_curve(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, color: str) -> None:
    if len(x) >= 20:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.4)
        y = smooth(y, window=max(5, len(x) // 20))
    axes.plot(x, y, color=color, label=label, marker="o" if len(x) == 1 else None, markersize=4)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over ``window`` values (fewer at the ends), passing over NaN."""
    kernel = np.ones(window)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1.0), math.nan)


def svg_text(figure: Figure) -> str:
    """The drawing for a page: colours as CSS variables, no addresses."""
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
