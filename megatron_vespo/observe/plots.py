"""The report's plots of a run's records over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from megatron_vespo.observe.canvas import INK, SERIES, add_legend, new_figure, styled, to_svg
from megatron_vespo.observe.records import Record, is_headline, number


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


@dataclass(frozen=True, slots=True)
class Fan:
    """Quantiles of one quantity over the steps, as bands around the median."""

    title: str
    note: str
    quantity: str
    """Record keys are ``<quantity>/p05`` and so on."""
    color: str


def parts(quantity: str, label: str) -> tuple[tuple[str, str], ...]:
    """The series of ``quantity`` and of what staleness and the engine alone make of it."""
    return (quantity, label), (f"{quantity}_stale", "stale"), (f"{quantity}_engine", "engine")


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
        *("Staleness", "Weight version trained minus version that sampled, per token."),
        *((("staleness_mean", "mean"), ("staleness_max", "maximum")),),
        floor=0.0,
    ),
)
MISMATCH = (
    Panel(
        *("Trainer against engine", "Per token, same weights: mean and largest |Δ log p|, and the k3 estimate of KL."),
        *((("rollout_logprob_diff", "|Δ log p|"), ("mismatch/max", "largest"), ("k3_engine", "k3")),),
        log=True,
    ),
    Panel(
        *("KL(μ‖π_old), nats a token", "Two estimates: k1, unbiased and noisy, and k3, never negative."),
        *((("mismatch/kl", "k1"), ("k3_engine", "k3")),),
        reference=0.0,
    ),
    Panel(
        *("Perplexity ratio", "The engine's over the trainer's, by response: mean, 5 % and 95 % quantiles."),
        *((("mismatch/ppl_ratio", "mean"), ("mismatch/ppl_ratio/p05", "5 %"), ("mismatch/ppl_ratio/p95", "95 %")),),
        reference=1.0,
    ),
    Panel(
        *("Routing mismatch", "Share of replayed (token, layer) pairs that the trainer's own router sends elsewhere."),
        *((("routing_mismatch_engine", "engine"), ("routing_mismatch_update", "in the update")),),
        floor=0.0,
    ),
    Panel(
        *(
            "Weight-sync probe",
            "|engine − trainer| log-prob of the same few responses of the first step, right after each sync.",
        ),
        *((("sync_probe_max", "maximum"), ("sync_probe_diff", "mean"), ("sync_probe_k3", "k3")),),
        log=True,
    ),
)
WEIGHTS = (
    Fan(
        *("log W, stale", "log π − log π_old summed over a response: quantiles over the responses of a step."),
        *("health/log_w_stale", SERIES[1]),
    ),
    Fan(
        *("log W, engine", "log π_old − log μ summed over a response: the engine's mismatch, mind the scale."),
        *("health/log_w_engine", SERIES[2]),
    ),
    Panel(
        *("Effective sample size", "(Σx)² / (n Σx²) of W, of its two factors and of φ: the share that still counts."),
        *((*parts("health/ess_w", "W"), ("health/ess_phi", "φ")),),
        reference=1.0,
        floor=0.0,
    ),
    Panel(
        *("Length slope of φ", "Change of φ per 1,000 tokens of a response's length; below 0 long answers lose."),
        parts("health/phi_slope", "φ"),
        reference=0.0,
    ),
    Panel(
        *("Dead responses, A > 0", "Share with φ < 0.01. Stale, engine: had the other factor of W been 1."),
        parts("health/dead_positive", "whole"),
        floor=0.0,
    ),
    Panel(
        *("Dead responses, A < 0", "Likewise. A bad response that the policy has left already may well be dead."),
        parts("health/dead_negative", "whole"),
        floor=0.0,
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
    with styled():
        figure, axes = new_figure()
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
            add_legend(figure, axes)
        return to_svg(figure)


def draw_fan(fan: Fan, steps: Sequence[Record]) -> str | None:
    """The fan as SVG text, or None if the records have none of its quantiles."""
    x = np.array([record["step"] for record in steps])
    rows = [[number(record, f"{fan.quantity}/p{q:02d}") for record in steps] for q in (5, 25, 50, 75, 95)]
    curves = [np.array([math.nan if value is None else value for value in row]) for row in rows]
    if not np.isfinite(curves).any():
        return None
    with styled():
        figure, axes = new_figure()
        for y in (curves[0], curves[-1]) if smoothing(x) else ():
            axes.plot(x, y, color=fan.color, linewidth=0.6, alpha=0.4)  # so that smoothing hides no step gone wrong
        low, lower, middle, upper, high = (smooth(y, smoothing(x)) for y in curves)
        axes.fill_between(x, low, high, color=fan.color, alpha=0.18, linewidth=0, label="5–95 %")
        axes.fill_between(x, lower, upper, color=fan.color, alpha=0.35, linewidth=0, label="25–75 %")
        axes.plot(x, middle, color=fan.color, label="median")
        axes.axhline(0.0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        add_legend(figure, axes)
        return to_svg(figure)


def _curves(panel: Panel, steps: Sequence[Record]) -> dict[str, np.ndarray]:
    """Label -> [steps] values, NaN where missing; a quantity equal to an earlier one (accuracy = reward) shares it."""
    curves: dict[str, np.ndarray] = {}
    for key, label in panel.series:
        values = [number(record, key) for record in steps]
        y = np.array([math.nan if value is None else value for value in values])
        if not np.isfinite(y).any() or (panel.only_if_varying and np.nanmin(y) == np.nanmax(y)):
            continue
        twin = next((name for name, other in curves.items() if np.array_equal(y, other, equal_nan=True)), None)
        if twin is None:
            curves[label] = y
        else:  # in its place, so that the others keep their colours
            curves = {f"{name} = {label}" if name == twin else name: other for name, other in curves.items()}
    return curves


def _scores(evaluations: Sequence[Record]) -> dict[str, list[tuple[int, float]]]:
    """Score name -> its (step, value) points."""
    scores: dict[str, list[tuple[int, float]]] = {}
    for record in evaluations:
        for name, value in record["eval"].items():
            if is_headline(name) and isinstance(value, int | float):
                scores.setdefault(name, []).append((record["step"], value))
    return scores


def draw_seconds(steps: Sequence[Record]) -> str | None:
    """Seconds by phase, stacked, over the steps; None if no record has any."""
    rows = [(record["step"], record["seconds"]) for record in steps if record.get("seconds")]
    if not rows:
        return None
    phases = list(dict.fromkeys(phase for _, seconds in rows for phase in seconds))
    with styled():
        figure, axes = new_figure()
        # One outline a phase, a plateau a step: as bars, 1,500 steps would be 7,500 rectangles.
        edges = np.array([rows[0][0], *(step + 1 for step, _ in rows)]) - 0.5
        bottom = np.zeros(len(edges))
        for phase, color in zip(phases, SERIES * len(phases), strict=False):
            heights = [seconds.get(phase) or 0.0 for _, seconds in rows]
            top = bottom + np.array([*heights, heights[-1]])
            axes.fill_between(edges, bottom, top, step="post", color=color, label=phase, linewidth=0)
            bottom = top
        axes.set_ylabel("seconds a step")
        add_legend(figure, axes)
        return to_svg(figure)


def _draw_curve(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, color: str) -> None:
    if smoothing(x):
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.4)
    y = smooth(y, smoothing(x))
    axes.plot(x, y, color=color, label=label, marker="o" if len(x) == 1 else None, markersize=4)


def smoothing(x: np.ndarray) -> int:
    """The window for as many steps; 0: too few to smooth."""
    return max(5, len(x) // 20) if len(x) >= 20 else 0


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over ``window`` values (fewer at the ends), passing over NaN; as they are for window 0."""
    if not window:
        return values
    kernel = np.ones(window)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1.0), math.nan)
