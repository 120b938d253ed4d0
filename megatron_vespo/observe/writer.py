"""What a run leaves behind while it runs: metrics.jsonl, samples/, and Weights & Biases if asked for."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.observe.records import Record, read_records
from megatron_vespo.samples.records import Sample


class RunWriter:
    """The only writer of a run directory's metrics and samples.

    ``resumed_step``: None for a new run (an older metrics.jsonl is kept as metrics.previous.jsonl); otherwise the step
    of the checkpoint that the run goes on from, and what was written for later steps is removed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resumed_step: int | None = None,
        wandb_mode: str = "disabled",
        project: str = "megatron_vespo",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.samples_dir = run_dir / "samples"
        self.samples_dir.mkdir(parents=True, exist_ok=True)
        metrics_path = run_dir / "metrics.jsonl"
        kept = -1 if resumed_step is None else resumed_step
        if resumed_step is None:
            if metrics_path.exists():
                metrics_path.replace(run_dir / "metrics.previous.jsonl")
        else:
            _keep_until(metrics_path, kept)
        for path in self.samples_dir.glob("step_*"):
            if _step_of(path) > kept:
                path.unlink()
        self._metrics = metrics_path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(run_dir, wandb_mode, project, name, config) if wandb_mode != "disabled" else None

    def write(self, record: Record) -> None:
        """Append one record (see records.py) and flush it. A number that is not finite is written as null."""
        self._metrics.write(json.dumps(finite(record), ensure_ascii=False) + "\n")
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log(flatten(record), step=record["step"])

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """``samples/step_000123.md`` for people, ``.jsonl`` with the same content for programs."""
        rows = [sample_row(sample) for sample in samples]
        stem = self.samples_dir / f"step_{step:06d}"
        stem.with_suffix(".jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        text = f"# Step {step}\n\n" + "\n".join(sample_markdown(row) for row in rows)
        stem.with_suffix(".md").write_text(text)

    def close(self) -> None:
        self._metrics.close()
        if self._wandb is not None:
            import wandb

            self._wandb.finish()
            wandb.teardown()  # finish may return before wandb's own process has written everything and ended
            self._wandb = None

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sample_row(sample: Sample) -> dict[str, Any]:
    """What a person wants to see of a sample, JSON-able. ``versions`` is run-length coded: [[version, tokens], ...]."""
    versions, counts = np.unique(sample.weight_versions, return_counts=True)
    return {
        "id": sample.id,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "gold": sample.prompt.answer,
        "reward": sample.reward,
        "advantage": sample.advantage,
        "tokens": len(sample.response_tokens),
        "versions": [[int(version), int(count)] for version, count in zip(versions, counts, strict=True)],
        "finish_reason": sample.finish_reason,
    }


def sample_markdown(row: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{version} ({count} tokens)" for version, count in row["versions"])
    facts = [
        f"reward **{_short(row['reward'])}**",
        f"gold `{row['gold']}`",
        *([f"advantage {_short(row['advantage'])}"] if row["advantage"] is not None else []),
        f"{row['tokens']} tokens, finished by {row['finish_reason']}",
        f"weight version {versions}",
    ]
    prompt, response = _fenced(row["prompt"]), _fenced(row["response"])
    return f"## {row['id']}\n\n{' · '.join(facts)}\n\nPrompt:\n{prompt}\n\nResponse:\n{response}\n"


def flatten(record: Record, prefix: str = "") -> dict[str, Any]:
    """Nested mappings become ``outer/inner`` keys; lists (a timeline) are left out."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        elif not isinstance(value, list | tuple):
            flat[prefix + name] = value
    return flat


def _keep_until(path: Path, step: int) -> None:
    """Drop the records after ``step``, and a torn last line, without a moment at which the file is half written."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _start_wandb(run_dir: Path, mode: str, project: str, name: str | None, config: Mapping[str, Any] | None) -> Any:
    import wandb  # here: it costs a second, and most runs on a laptop do not want it

    folder = run_dir / "logs"
    folder.mkdir(exist_ok=True)
    # One id for the life of the run directory, so that a resumed run goes on in the same wandb run.
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=project,
        name=name,
        id=id_file.read_text().strip(),
        resume="allow" if mode == "online" else None,
        dir=str(folder),
        config=dict(config or {}),
        settings=wandb.Settings(console="off"),
    )
