"""The report's parts that are made from the stored rollouts, not from the records."""

from __future__ import annotations

from html import escape
from pathlib import Path

from megatron_vespo.config.load import load_config
from megatron_vespo.config.schema import ObjectiveConfig, RunConfig
from megatron_vespo.objectives.budget import Budget
from megatron_vespo.observe import markup
from megatron_vespo.observe.run_budget import (
    BudgetRow,
    EngineMismatch,
    PhiOf,
    budget_rows,
    describe,
    measure_mismatch,
    phi_of,
    span_text,
)
from megatron_vespo.observe.weight_plots import draw_phi_against_length, draw_signal, draw_spread
from megatron_vespo.policy.objective import objective_of
from megatron_vespo.policy.response_weights import weigh_trained
from megatron_vespo.samples.store import batch_file, read_batch, stored_steps


def stored_sections(run_dir: Path) -> str:
    """phi against length in the newest batch, and the mismatch budget, where the run knows its engine's mismatch; ""
    where no rollouts are stored.

    What cannot be read or has no answer is said in the page, and does not keep the rest of it from being made.
    """
    steps = stored_steps(run_dir / "rollouts")
    if not steps:
        return ""
    try:
        config = load_config(run_dir / "config.resolved.yaml").run
        phi = _phi_section(run_dir, steps[-1], config)
        if not config.knows_old_policy:
            return phi
        return phi + _budget_section(measure_mismatch(run_dir), config.objective)
    except ValueError as error:  # ConfigError, StoreError
        return markup.section("Stored rollouts", markup.note(str(error)))


def _phi_section(run_dir: Path, step: int, config: RunConfig) -> str:
    table = weigh_trained(objective_of(config), read_batch(batch_file(run_dir / "rollouts", step)))
    table = table.rows(table.lengths > 0)
    note = "Dots: single responses. Lines: means over ranges of length, with standard errors; 1 is on policy."
    signs = (("A > 0", table.rows(table.advantages > 0)), ("A < 0", table.rows(table.advantages < 0)))
    figures = [
        markup.figure(f"φ against length, {sign}", note, svg)
        for sign, some in signs
        if (svg := draw_phi_against_length(some))
    ]
    return markup.section(
        f"What {escape(config.objective.name)} made of the responses of step {step}", markup.grid(figures)
    )


def _budget_section(mismatch: EngineMismatch, objective: ObjectiveConfig) -> str:
    lines = [describe(mismatch) + "."]
    phi: PhiOf | None = None
    try:
        phi = phi_of(objective.name, objective.params)
    except ValueError as error:
        lines.append(f"Only log W is predicted: {error}.")
    if phi and objective.correction != "none":
        lines.append(
            f"As if W_engine stood inside φ(W); this run's correction, {objective.correction}, treats it otherwise."
        )
    rows = budget_rows(mismatch, phi)
    figures = [
        markup.figure(
            "Spread of log W, engine",
            "Standard deviation over responses; above resampled: the mismatch is correlated along a response.",
            draw_spread(rows, mismatch.k3),
        )
    ]
    if phi:
        figures.append(
            markup.figure(
                "Mean φ under the engine's mismatch alone",
                "What is left of a response's weight; 90 % bootstrap intervals.",
                draw_signal(rows, phi, mismatch.k3),
            )
        )
    content = markup.note(" ".join(lines)) + markup.grid(figures) + _table(rows, with_phi=phi is not None)
    return markup.section("Mismatch budget: prediction beside measurement", content)


def _table(rows: list[BudgetRow], *, with_phi: bool) -> str:
    columns = ("mean φ", "ESS", "φ &lt; 0.01") if with_phi else ()
    head = '<tr><th colspan="4"></th>' + "".join(f'<th colspan="2">{name}</th>' for name in columns) + "</tr>"
    head += "<tr><th>tokens</th><th>responses</th><th></th><th>log W, engine</th>"
    head += "<th>A ≥ 0</th><th>A &lt; 0</th>" * len(columns) + "</tr>"
    body = []
    for row in rows:
        first = row.source == "normal"
        cells = [span_text(row), f"{row.responses:,}"] if first else ["", ""]
        cells += [row.source, f"{row.mean:.2g} ± {row.deviation:.2g}"]
        for name, form in (("mean_phi", ".3f"), ("ess", ".3f"), ("dead", ".1%")) if row.signs else ():
            for sign in (0, 1):
                cells.append(_with_interval(row, name, form, sign))
        mood = f' class="{row.source}"'
        body.append(f"<tr{mood}>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
    return f'<div class="scroll budget"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def _with_interval(row: BudgetRow, name: str, form: str, sign: int) -> str:
    def text(budget: Budget) -> str:
        return format(getattr(budget, name), form)

    assert row.signs is not None
    value = text(row.signs[sign])
    if row.sign_ends is None:
        return value
    low, high = row.sign_ends[sign]
    return f'<strong>{value}</strong><div class="hint">{text(low)} – {text(high)}</div>'
