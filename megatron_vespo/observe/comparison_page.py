"""compare.html: a comparison of objectives as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from megatron_vespo.objectives.budget import DEAD
from megatron_vespo.objectives.lab import Angles
from megatron_vespo.observe.comparison import Comparison, Response
from megatron_vespo.observe.comparison_plots import draw_by_length, draw_phi, draw_thrown_away
from megatron_vespo.observe.comparison_tables import SUMMARY_COLUMNS, compact, number, share
from megatron_vespo.observe.markup import document, figure, grid, heading, section

TEXT_SHOWN = 1200
"""Characters of a disputed response."""
PHI = (
    "What a response counts, 1 being on policy. A point is a response; the line is one of median length whose log W "
    "lies evenly on its tokens. A sequence-level objective has every point on its line. What lies beyond the frame is "
    "drawn on its edge."
)
DEEPEST = 60
"""Per cent of the colour in a cell of value 1: the text on it stays readable."""


def render(comparison: Comparison) -> str:
    title = f"{comparison.run}: objectives compared"
    bars = [
        figure("Thrown away", f"Responses that count less than {DEAD} of one on policy.", draw_thrown_away(comparison)),
        figure(
            "Weight by length",
            "Parts of the gradient's weight, the sum of |g| over tokens, by length. Dashed: parts of the tokens.",
            draw_by_length(comparison),
        ),
    ]
    return document(
        title,
        [
            heading(title, comparison.facts()),
            section("Side by side", _summary(comparison)),
            section("phi over log W", f"<figure>{note(PHI)}{draw_phi(comparison)}</figure>"),
            section("Who counts", grid(bars)),
            section("Thrown away, mini-batch by mini-batch", _by_mini_batch(comparison)),
            section("Which way they point", _angles(comparison)),
            section("Responses that the objectives agree about least", _disputed(comparison)),
        ],
    )


def _summary(comparison: Comparison) -> str:
    whole = comparison.whole
    spaces = [("log-probs", whole.in_logprobs)]
    if whole.in_parameters is not None:
        spaces.append(("parameters", whole.in_parameters))
    heads = [title for title, _, _ in SUMMARY_COLUMNS]
    for name, _ in spaces:
        heads += [f"{name}:\nnorm", f"{name}:\ncosine"]
    reference = comparison.labels.index(comparison.reference)
    rows = []
    for i, (label, found) in enumerate(whole.objectives.items()):
        cells = [form(getattr(found, field)) for _, field, form in SUMMARY_COLUMNS]
        for _, space in spaces:
            cells += [compact(space.norms[i]), number(space.cosines[i][reference], "+.4f")]
        rows.append(_row(_label(comparison, label), "".join(f"<td>{cell}</td>" for cell in cells)))
    about = (
        "c: the coefficient of A grad log pi of a token. Norms and cosines are of the gradients with respect to the "
        f"log-probs{' and to the parameters' if whole.in_parameters else ''}; cosines are to {comparison.reference}."
    )
    return note(about) + _table(heads, rows)


def _by_mini_batch(comparison: Comparison) -> str:
    parts = comparison.mini_batches
    if len(parts) < 2:
        return ""
    heads = [f"version {part.versions[0]}\n{part.staleness:.1f} stale" for part in parts]
    rows = []
    for label in comparison.labels:
        values = [part.objectives[label].thrown_away for part in parts]
        rows.append(_row(_label(comparison, label), "".join(_heat(value, share(value)) for value in values)))
    about = "Share of the responses of each update, by the version that it began from and how stale its tokens were."
    return note(about) + _table(heads, rows)


def _angles(comparison: Comparison) -> str:
    whole = comparison.whole
    tables = [
        figure(
            "Cosines in the space of the log-probs",
            "Of the gradients with respect to every token's log-prob, all mini-batches laid end to end.",
            _cosines(comparison, whole.in_logprobs),
        )
    ]
    if whole.in_parameters is not None:
        note = f"Of the gradients with respect to all parameters, at {comparison.weights}."
        tables.append(figure("Cosines in the space of the parameters", note, _cosines(comparison, whole.in_parameters)))
    return "".join(f'<div class="stacked">{table}</div>' for table in tables)


def _cosines(comparison: Comparison, angles: Angles) -> str:
    rows = [
        _row(_label(comparison, label), "".join(_heat(value, number(value, ".2f")) for value in angles.cosines[i]))
        for i, label in enumerate(comparison.labels)
    ]
    return _table(comparison.labels, rows, kind="matrix")


def _disputed(comparison: Comparison) -> str:
    return "".join(_response(response) for response in comparison.disputed())


def _response(response: Response) -> str:
    facts = [
        response.id,
        f"A {response.advantage:+.2f}",
        f"{response.tokens} tokens",
        f"log W {response.log_w_stale:+.3g} stale, {response.log_w_engine:+.2g} engine",
    ]
    mood = "unknown" if response.reward is None else "good" if response.reward > 0 else "bad"
    chip = "–" if response.reward is None else f"{response.reward:g}"
    thrown = response.thrown_away_by
    phi = "".join(
        f"<span{' class=dead' if label in thrown else ''}>{escape(label)} <b>{value:.2f}</b></span>"
        for label, value in sorted(response.phi.items(), key=lambda item: -abs(item[1]))
    )
    text = response.text if len(response.text) <= TEXT_SHOWN else response.text[:TEXT_SHOWN] + " [...]"
    return (
        f'<article class="sample"><p class="facts"><span class="chip {mood}">reward {chip}</span>'
        + "".join(f"<span>{escape(fact)}</span>" for fact in facts)
        + f'</p><p class="facts phi">phi: {phi}</p><pre>{escape(text)}</pre></article>'
    )


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _label(comparison: Comparison, label: str) -> str:
    return f"<b>{escape(label)}</b>" if label == comparison.own else escape(label)


def _heat(value: float, text: str) -> str:
    if math.isnan(value):
        return "<td>–</td>"
    kind = "heat minus" if value < 0 else "heat"
    return f'<td class="{kind}" style="--heat: {abs(value) * DEEPEST:.0f}%">{text}</td>'


def _row(head: str, cells: str) -> str:
    return f"<tr><th>{head}</th>{cells}</tr>"


def _table(heads: Sequence[str], rows: Sequence[str], *, kind: str = "") -> str:
    cells = "".join(f"<th><span>{escape(head)}</span></th>" for head in heads)
    return (
        f'<div class="scroll whole {kind}"><table><thead><tr><th></th>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
