"""What a person sees while a run goes: a bar and a line a step on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_vespo.observe.records import Record, is_headline, is_score, number

TELL_EVERY_S = 30.0


class RunProgress:
    """``with RunProgress(total, first_step) as progress: ... progress.phase("rollout") ... progress.step(record)``.

    On a terminal the bar stays below the lines and names the phase under way. Elsewhere (CI, a file) there is no bar.
    """

    def __init__(self, total_steps: int, done_steps: int = 0, console: Console | None = None) -> None:
        self.total_steps = total_steps
        self.console = console or Console(highlight=False)
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[cyan]{task.fields[phase]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=done_steps, phase="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str) -> None:
        self._bar.update(self._task, phase=name)

    def step(self, record: Record) -> None:
        self._print(step_line(record, self.total_steps))
        self._bar.update(self._task, completed=record["step"], phase="")

    def evaluation(self, record: Record) -> None:
        self._print(evaluation_line(record), style="bold green")

    def message(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str, style: str | None = None) -> None:
        # soft_wrap: a log line must stay one line, whatever width a pipe is said to have.
        self.console.print(escape(text), style=style, soft_wrap=True)


FIELDS = (
    ("reward", "reward {:.3f}"),
    ("accuracy", "acc {:.3f}"),
    ("response_length", "len {:.0f}"),
    ("w/mean", "W {:.3f}"),
    ("w/ess", "ESS {:.3f}"),
    ("staleness_mean", "lag {:.1f}"),
    ("rollout_logprob_diff", "|Δlogp| {:.1e}"),
    ("loss", "loss {:+.4f}"),
    ("grad_norm", "grad {:.2f}"),
    ("tokens_per_s", "{:.0f} tok/s"),
)


def step_line(record: Record, total_steps: int) -> str:
    """``step 12/40 · reward 0.531 · ... · 4.1 s (rollout 2.0, train 1.7, ...)``; a missing metric is passed over."""
    width = len(str(total_steps))
    parts = [f"step {record['step']:>{width}}/{total_steps}"]
    for name, form in FIELDS:
        value = number(record, name)
        if value is not None:
            parts.append(form.format(value))
    seconds = {phase: s for phase, s in (record.get("seconds") or {}).items() if s is not None}
    if seconds:
        by_phase = ", ".join(f"{phase} {s:.1f}" for phase, s in seconds.items())
        parts.append(f"{sum(seconds.values()):.1f} s ({by_phase})")
    return " · ".join(parts)


def evaluation_line(record: Record) -> str:
    """``held-out at step 40: greedy 0.812 · avg@4 0.774 (200 problems)``."""
    scores = record["eval"]
    problems = scores.get("n")
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float) and is_score(name)}
    shown = " · ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    return f"held-out at step {record['step']}: {shown}" + (f" ({problems} problems)" if problems else "")


def accuracy_lines(records: Sequence[Record]) -> list[str]:
    """``held-out greedy: 0.234 before, 0.855 after``, a line a score; [] with fewer than two evaluations."""
    evaluations = [record["eval"] for record in records if "eval" in record]
    if len(evaluations) < 2:
        return []
    before, after = evaluations[0], evaluations[-1]  # on all sets, both of them
    return [
        f"held-out {name}: {before[name]:.3f} before, {after[name]:.3f} after"
        for name in after
        if is_headline(name) and name in before
    ]


class ResponseProgress:
    """``with ResponseProgress(what, total) as progress: ... progress.add(n)``: a bar, or a line now and then."""

    def __init__(self, what: str, total: int, console: Console) -> None:
        self.what, self.total, self.console = what, total, console
        self._count, self._told = 0, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(escape(what), total=total)

    def __enter__(self) -> ResponseProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, responses: int) -> None:
        self._count += responses
        self._bar.update(self._task, completed=self._count)
        now = time.monotonic()
        if not self.console.is_terminal and (self._count == self.total or now - self._told >= TELL_EVERY_S):
            self._told = now
            line = f"{self.what}: {self._count} of {self.total} responses"
            self.console.print(escape(line), soft_wrap=True, highlight=False)
