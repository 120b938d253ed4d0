"""The report's plots of who worked when: a timeline of trainer and engines, the queue between them, and staleness."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_vespo.observe.canvas import SERIES, add_legend, new_figure, styled, to_svg
from megatron_vespo.observe.plots import Panel
from megatron_vespo.observe.records import Record

STEPS_SHOWN = 8
"""Of the timeline: more would be a barcode."""
BARS_SHOWN = 24
"""Of the histogram; wider lags are binned."""
SAMPLING = "sampling"
"""The phase of the engines' lanes."""

UTILISATION = (
    Panel(
        *(
            "Busy",
            "Share of the wall time in which the trainer computes, and in which an engine has requests (mean of all).",
        ),
        *((("busy/trainer", "trainer"), ("busy/engines", "engines")),),
        floor=0.0,
    ),
    Panel(
        *("Queue", "Prompt groups when an update takes its own: done, and open in all (asked for and not yet taken)."),
        *((("queue/ready", "done"), ("queue/open", "open"), ("queue/open_max", "open, largest")),),
        floor=0.0,
    ),
    Panel(
        *("Dropped groups", "Since the run began: too stale to be trained, or (dynamic sampling) without spread."),
        *((("rollouts/dropped_stale", "too stale"), ("rollouts/dropped_without_spread", "without spread")),),
        floor=0.0,
    ),
)

Stretch = tuple[str, str, float, float]
"""Lane, phase, start and end; seconds."""


def draw_timeline(records: Sequence[Record]) -> str | None:
    """The trainer's phases and the engines' work over the wall time of a few steps in the middle of the run, as SVG
    text; None if the records have no timeline."""
    with_one = [record for record in records if record.get("timeline")]
    if not with_one:
        return None
    first = max(0, (len(with_one) - STEPS_SHOWN) // 2)
    shown = with_one[first : first + STEPS_SHOWN]
    stretches: list[Stretch] = [tuple(row) for record in shown for row in record["timeline"]]
    start = min(row[2] for row in stretches)
    lanes = sorted({row[0] for row in stretches}, key=_lane_order)
    phases = list(dict.fromkeys(row[1] for row in sorted(stretches, key=lambda row: row[2]) if row[1] != SAMPLING))
    colors = {SAMPLING: SERIES[1]} | dict(zip(phases, (SERIES[:1] + SERIES[2:]) * len(phases), strict=False))
    with styled():
        figure = Figure(figsize=(11, 0.9 + 0.32 * len(lanes)), layout="constrained")
        axes = figure.add_subplot()
        for phase in [*phases, SAMPLING]:
            label: str | None = phase
            for height, lane in enumerate(lanes):
                bars = [(row[2] - start, row[3] - row[2]) for row in stretches if row[:2] == (lane, phase)]
                if bars:
                    axes.broken_barh(bars, (height - 0.36, 0.72), color=colors[phase], linewidth=0, label=label)
                    label = None
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.margins(x=0.005)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"seconds; steps {shown[0]['step']} to {shown[-1]['step']}")
        add_legend(figure, axes)
        return to_svg(figure)


def lag_shares(steps: Sequence[Record]) -> tuple[dict[int, float], int]:
    """Staleness -> share of all trained tokens, ascending; and how many tokens these are."""
    tokens: Counter[int] = Counter()
    for record in steps:
        tokens.update({int(lag): count for lag, count in (record.get("staleness_tokens") or {}).items()})
    total = sum(tokens.values())
    return {lag: tokens[lag] / total for lag in sorted(tokens)}, total


def draw_staleness(steps: Sequence[Record]) -> str | None:
    """Share of all trained tokens by staleness, as SVG text; None if no record tells, or all were on policy."""
    shares, total = lag_shares(steps)
    if not any(shares):
        return None
    width = math.ceil((max(shares) + 1) / BARS_SHOWN)
    bars = [sum(share for lag, share in shares.items() if lag // width == i) for i in range(max(shares) // width + 1)]
    with styled():
        figure, axes = new_figure("staleness" if width == 1 else f"staleness, {width} updates a bar")
        axes.bar([(i + 0.5) * width - 0.5 for i in range(len(bars))], bars, width=0.8 * width, color=SERIES[0])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel(f"of {total:,} trained tokens")
        return to_svg(figure)


def _lane_order(lane: str) -> tuple[bool, int, str]:
    number = lane.rpartition(" ")[2]
    return lane != "trainer", int(number) if number.isdigit() else 0, lane
