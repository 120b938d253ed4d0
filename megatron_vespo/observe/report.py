"""report.html: one self-contained page about a run, made from what the run directory holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megatron_vespo.observe import markup, plots, utilisation
from megatron_vespo.observe.records import Record, is_headline, is_score, number, read_records, set_of

SAMPLES_SHOWN = 4
"""Of the first and of the last step that has samples."""
TEXT_SHOWN = 4000
"""Characters of a prompt or a response."""


class ReportError(RuntimeError):
    """A run directory without anything to report. The message names the file that is missing."""


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from metrics.jsonl, config.resolved.yaml, samples/ and rollouts/; return its path.

    The page needs no network and follows the reader's light or dark preference. Anything but metrics.jsonl may be
    missing. Raises :class:`ReportError` if there are no metrics.
    """
    run_dir = Path(run_dir)
    records = read_records(run_dir / "metrics.jsonl")
    if not records:
        raise ReportError(f"{run_dir / 'metrics.jsonl'} is missing or holds no record yet. Is this a run directory?")
    config_path = run_dir / "config.resolved.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    page = render(run_dir.name, records, config_text, read_samples(run_dir / "samples"), *_stored(run_dir, config_text))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_samples(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of the first and the last samples/step_*.jsonl, by step."""
    files = sorted(folder.glob("step_*.jsonl"))
    found: dict[int, list[dict[str, Any]]] = {}
    for path in dict.fromkeys(files[:1] + files[-1:]):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found[int(path.stem.removeprefix("step_"))] = rows
    return found


def _stored(run_dir: Path, config_text: str) -> tuple[str, str]:
    """What the stored rollouts say: tables of the mismatch, and sections of their own."""
    if not (run_dir / "rollouts").is_dir():
        return "", ""
    # Here: they cost the import of torch.
    from megatron_vespo.observe.mismatch_tables import mismatch_tables
    from megatron_vespo.observe.stored_weights import stored_sections

    unknown = _setting(_parsed(config_text), "train", "old_logprobs") == "engine"
    return "" if unknown else mismatch_tables(run_dir), stored_sections(run_dir)


def render(
    run_name: str,
    records: Sequence[Record],
    config_text: str,
    samples: dict[int, list[dict[str, Any]]],
    mismatch: str = "",
    stored: str = "",
) -> str:
    """The page. ``mismatch``: tables that belong to that section; ``stored``: sections from the stored rollouts."""
    evaluations = [record for record in records if isinstance(record.get("eval"), dict)]
    steps = [record for record in records if "eval" not in record]
    config = _parsed(config_text)

    def panels(group: Sequence[plots.Panel | plots.Fan]) -> list[str]:
        drawn = [
            (p, plots.draw_fan(p, steps) if isinstance(p, plots.Fan) else plots.draw(p, steps, evaluations))
            for p in group
        ]
        return [markup.figure(p.title, p.note, svg) for p, svg in drawn if svg]

    throughput = panels(plots.THROUGHPUT)
    if seconds := plots.draw_seconds(steps):
        throughput.append(markup.figure("Time by phase", "Where the wall time of each step went.", seconds))
    off_policy = panels(plots.OFF_POLICY)
    if lags := utilisation.draw_staleness(steps):
        off_policy.append(markup.figure("Staleness of all trained tokens", "Updates behind, over the whole run.", lags))
    body = [
        _header(run_name, config, steps),
        _tiles(steps, evaluations),
        markup.section("Learning", markup.grid(panels(plots.LEARNING))),
        markup.section("Held-out accuracy", _evaluation_tables(evaluations)),
        markup.section("Off-policy health", markup.grid(off_policy)),
        markup.section(_mismatch_title(config), markup.grid(panels(plots.MISMATCH)) + mismatch),
        markup.section("Sequence weights", markup.grid(panels(plots.WEIGHTS))),
        stored,
        markup.section("Optimisation", markup.grid(panels(plots.OPTIMISATION))),
        markup.section("Throughput", markup.grid(throughput)),
        markup.section("Utilisation", _timeline(records) + markup.grid(panels(utilisation.UTILISATION))),
        markup.section("Samples", _samples(samples)),
        markup.section(
            "Configuration",
            f"<details><summary>config.resolved.yaml</summary><pre>{escape(config_text)}</pre></details>",
        )
        if config_text
        else "",
    ]
    return markup.document(_name(run_name, config), body)


def _timeline(records: Sequence[Record]) -> str:
    svg = utilisation.draw_timeline(records)
    note = "Who worked when, in the middle of the run: the trainer's phases, and when each engine had requests."
    return markup.figure("Timeline", note, svg) if svg else ""


def _parsed(config_text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _setting(config: dict[str, Any], *path: str) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None  # type: ignore[assignment]
    return config


def _name(run_name: str, config: dict[str, Any]) -> str:
    return str(config.get("name") or run_name)


def _header(run_name: str, config: dict[str, Any], steps: Sequence[Record]) -> str:
    parallel = config.get("parallel") if isinstance(config.get("parallel"), dict) else {}
    assert isinstance(parallel, dict)
    layout = [f"{short}{parallel[key]}" for key, short in LAYOUT if isinstance(parallel.get(key), int)]
    facts = [
        ("objective", _setting(config, "objective", "name")),
        ("aggregation", _setting(config, "objective", "aggregation")),
        ("mode", _setting(config, "train", "mode")),
        ("engine", _setting(config, "rollout", "engine")),
        ("precision", _setting(config, "rollout", "precision")),
        ("layout", " ".join(layout)),
        ("mini-batches a step", _setting(config, "train", "mini_batches")),
        ("model", _setting(config, "model", "path")),
        ("seed", config.get("seed")),
    ]
    return markup.heading(_name(run_name, config), [(k, v) for k, v in facts if v not in (None, "")])


def _mismatch_title(config: dict[str, Any]) -> str:
    """``Train-inference mismatch: reference engine in fp8, trainer in float32``, as far as the config says."""
    precision, dtype = _setting(config, "rollout", "precision"), _setting(config, "model", "dtype")
    sides = [f"{_setting(config, 'rollout', 'engine')} engine in {precision}"] if precision else []
    sides += [f"trainer in {dtype}"] if dtype else []
    return escape("Train-inference mismatch" + (": " + ", ".join(sides) if sides else ""))


LAYOUT = (("tensor", "TP"), ("pipeline", "PP"), ("context", "CP"), ("expert", "EP"))


def _tiles(steps: Sequence[Record], evaluations: Sequence[Record]) -> str:
    tiles = []
    for name in filter(is_headline, _score_names(evaluations)):
        scores = [record["eval"][name] for record in evaluations if markup.is_number(record["eval"].get(name))]
        if len(scores) > 1:
            change = scores[-1] - scores[0]
            tiles.append((f"held-out {name}", f"{scores[0]:.3f} → <strong>{scores[-1]:.3f}</strong>", f"{change:+.3f}"))
        elif scores:
            tiles.append((f"held-out {name}", f"<strong>{scores[0]:.3f}</strong>", "one evaluation"))
    for key, label, form in (("accuracy", "training accuracy", ".3f"), ("response_length", "response length", ".0f")):
        if values := _numbers(steps, key):
            head, tail = median(values[:5]), median(values[-5:])
            tiles.append((label, f"{head:{form}} → <strong>{tail:{form}}</strong>", "first and last 5 steps"))
    if steps:
        seconds = sum(sum(_finite_values(record.get("seconds"))) for record in steps)
        tiles.append(
            ("steps", f"<strong>{steps[-1]['step']}</strong>", f"{duration(seconds)} of work" if seconds else "")
        )
    if values := _numbers(steps, "tokens_per_s"):
        tiles.append(("throughput", f"<strong>{median(values):,.0f}</strong> tokens/s", "median step"))
    cells = "".join(
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{value}</div>'
        f'<div class="hint">{escape(hint)}</div></div>'
        for label, value, hint in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _evaluation_tables(evaluations: Sequence[Record]) -> str:
    """One for data.evaluate, and one a set of evaluate.sets."""
    names = _score_names(evaluations)
    sets = dict.fromkeys(set_of(name) for name in names)
    return "".join(_evaluation_table(evaluations, each, [n for n in names if set_of(n) == each]) for each in sets)


def _evaluation_table(evaluations: Sequence[Record], held_out: str, names: Sequence[str]) -> str:
    prefix = f"{held_out}/" if held_out else ""
    head = "".join(f"<th>{escape(name.removeprefix(prefix))}</th>" for name in names)
    rows = []
    for record in evaluations:
        scores = record["eval"]
        if any(name in scores for name in names):
            cells = "".join(f"<td>{_score(record, name)}</td>" for name in names)
            when = "before training" if record["step"] == 0 else f"step {record['step']}"
            rows.append(f"<tr><th>{when}</th>{cells}<td>{markup.cell(scores.get(f'{prefix}n'), '.0f')}</td></tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>{escape(held_out)}</th>{head}<th>problems</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _score(record: Record, name: str) -> str:
    """With its interval, where the record has one."""
    shown = markup.cell(record["eval"].get(name), ".3f")
    low, high = (record.get("intervals") or {}).get(name) or (None, None)
    if markup.is_number(low) and markup.is_number(high):
        shown += f' <span class="hint">{low:.3f} to {high:.3f}</span>'
    return shown


def _samples(samples: dict[int, list[dict[str, Any]]]) -> str:
    columns = []
    for step, rows in samples.items():
        cards = "".join(_sample(row) for row in rows[:SAMPLES_SHOWN])
        columns.append(f"<div><h3>Step {step}</h3>{cards}</div>")
    return f'<div class="grid">{"".join(columns)}</div>' if columns else ""


def _sample(row: dict[str, Any]) -> str:
    reward = row.get("reward")
    mood = ("good" if reward > 0 else "bad") if isinstance(reward, int | float) else "unknown"
    versions = ", ".join(str(pair[0]) for pair in row.get("versions") or [])
    facts = [
        f"gold {row.get('gold')}",
        f"{row.get('tokens')} tokens",
        f"{row.get('finish_reason')}",
        *([f"version {versions}"] if versions else []),
    ]
    return (
        f'<article class="sample"><p class="facts"><span class="chip {mood}">reward {markup.cell(reward, "g")}</span>'
        + "".join(f"<span>{escape(fact)}</span>" for fact in facts)
        + f'</p><pre class="prompt">{_text(row.get("prompt"))}</pre><pre>{_text(row.get("response"))}</pre></article>'
    )


def _text(text: Any) -> str:
    text = "" if text is None else str(text)
    cut = len(text) - TEXT_SHOWN
    return escape(text) if cut <= 0 else f"{escape(text[:TEXT_SHOWN])}\n[... {cut} more characters]"


def _score_names(evaluations: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in evaluations for name in record["eval"] if is_score(name)))


def _numbers(steps: Sequence[Record], key: str) -> list[float]:
    return [value for record in steps if (value := number(record, key)) is not None]


def _finite_values(seconds: Any) -> list[float]:
    return [value for value in (seconds or {}).values() if markup.is_number(value)]


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
