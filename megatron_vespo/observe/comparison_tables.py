"""The comparison of objectives on a terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vespo.observe.comparison import Comparison, Response

TEXT_SHOWN = 90
"""Characters of a disputed response."""


def number(value: float, form: str = ".3f") -> str:
    return "–" if math.isnan(value) else format(value, form)


def share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def compact(value: float) -> str:
    """A norm: four digits, whatever its size."""
    return "–" if math.isnan(value) else f"{value:.4g}"


def print_whole(table: Table, console: Console) -> None:
    """As wide as it is: rich would cut its cells to the terminal's width, or to 80 columns in a pipe."""
    width = console.width
    console.width = max(width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    console.width = width


SUMMARY_COLUMNS = (
    ("mean c\nA > 0", "coefficient_positive", number),
    ("mean c\nA < 0", "coefficient_negative", number),
    ("tokens\nc = 0", "zero_tokens", share),
    ("thrown\naway\nA > 0", "thrown_away_positive", share),
    ("thrown\naway\nA < 0", "thrown_away_negative", share),
    ("ESS\nof phi", "ess", number),
    ("top tenth\ncarries", "top_tenth", share),
)
"""(head, field of Summary, how it is written), here and on the page."""


def print_summary(comparison: Comparison, console: Console) -> None:
    """The facts, a line an objective, and the responses that the objectives agree about least."""
    console.print(Text(f"{comparison.run} ({comparison.directory})", style="bold"))
    for name, value in comparison.facts():
        console.print(Text.assemble((f"  {name:<14}", "cyan"), value), soft_wrap=True)
    table = Table(title="From the log-probs, over all mini-batches", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("objective", no_wrap=True, vertical="bottom")
    heads = [head for head, _, _ in SUMMARY_COLUMNS] + ["norm of\ngradient", f"cosine to\n{comparison.reference}"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    whole = comparison.whole
    reference = comparison.labels.index(comparison.reference)
    for i, (label, found) in enumerate(whole.objectives.items()):
        table.add_row(
            Text(label, style="bold" if label == comparison.own else ""),
            *(form(getattr(found, field)) for _, field, form in SUMMARY_COLUMNS),
            compact(whole.in_logprobs.norms[i]),
            number(whole.in_logprobs.cosines[i][reference], "+.4f"),
        )
    print_whole(table, console)
    console.print(Text("Responses that the objectives agree about least", style="italic"))
    for response in comparison.disputed():
        print_response(response, console)


def print_response(response: Response, console: Console) -> None:
    highest = max(response.phi, key=lambda label: abs(response.phi[label]))
    thrown = response.thrown_away_by
    facts = (
        f"reward {response.reward:g}" if response.reward is not None else "no reward",
        f"A {response.advantage:+.2f}",
        f"{response.tokens} tokens",
        f"log W {response.log_w_stale:+.3g} stale {response.log_w_engine:+.2g} engine",
        f"phi up to {response.phi[highest]:.2f} ({highest})",
        f"thrown away by {', '.join(thrown)}" if thrown else "thrown away by none",
    )
    console.print(Text.assemble((f"  {response.id}", "bold"), "  ", " · ".join(facts)), soft_wrap=True)
    text = " ".join(response.text.split())
    shown = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " ..."
    console.print(Text(f"    {shown}", style="dim"), soft_wrap=True)


def print_gradients(comparison: Comparison, console: Console) -> None:
    """Norms and angles of the gradients with respect to the parameters."""
    found = comparison.whole.in_parameters
    assert found is not None
    reference = comparison.labels.index(comparison.reference)
    table = Table(title="Over all parameters of the policy", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("objective", no_wrap=True)
    table.add_column("norm of\ngradient", justify="right")
    table.add_column(f"cosine to\n{comparison.reference}", justify="right")
    for i, label in enumerate(comparison.labels):
        cosine = number(found.cosines[i][reference], "+.4f")
        table.add_row(Text(label, style="bold" if label == comparison.own else ""), compact(found.norms[i]), cosine)
    print_whole(table, console)
