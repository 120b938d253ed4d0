"""One cell: trained by the product's own loop, in this process. ``python -m benchmarks.staleness.cell ROOT NAME``.

What of it the study keeps is a line of JSON: the evaluations, the metrics over windows of updates, phi by length.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.staleness.grid import Cell
from benchmarks.staleness.single_process import open_in_process
from megatron_vespo.config.load import load_config
from megatron_vespo.loop.modes import train
from megatron_vespo.observe.weight_health import effective_share
from megatron_vespo.policy.objective import objective_of
from megatron_vespo.policy.response_weights import weigh_trained
from megatron_vespo.samples.store import batch_file, read_batch, stored_steps
from megatron_vespo.samples.weight_table import WeightTable, stacked

RESULT = "cell.json"
"""Written last: the cell is done."""
WINDOW = 16
"""Updates over which metrics are averaged, where a rollout batch has fewer."""
METRICS = ("reward", "entropy", "response_length", "grad_norm", "staleness_mean", "k3_engine", "log_w_engine/std")
DIGITS = 4
QUARTERS = 4
KEPT = ("config.resolved.yaml", "metrics.jsonl", "report.html", "samples")
"""Of the run directory; the rest nobody reads once the cell is done."""


def run_cell(root: Path, cell: Cell) -> None:
    folder = root / "cells" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(cell.config(root)))
    started = time.monotonic()
    resolved = load_config(file)
    with open_in_process(resolved) as run:
        train(run)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "cell": cell.name,
        "seconds": round(time.monotonic() - started),
        "evaluations": [[record["version"], record["eval"]] for record in records if "eval" in record],
        "windows": windows([record for record in records if "eval" not in record]),
        "phi_by_length": phi_by_length(folder, resolved.run),
    }
    for path in folder.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / RESULT).write_text(json.dumps(result) + "\n")


def windows(steps: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """METRICS averaged over the records of at least WINDOW updates each; ``updates``: made by the end of the window."""
    found: list[dict[str, float]] = []
    pending: list[dict[str, Any]] = []
    for record in steps:
        pending.append(record)
        if record["version"] - (found[-1]["updates"] if found else 0) >= WINDOW:
            held = {name: [r[name] for r in pending if name in r] for name in METRICS}
            means = {name: shortened(mean(values)) for name, values in held.items() if values}
            found.append({"updates": record["version"], **means})
            pending = []
    return found


def shortened(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def phi_by_length(folder: Path, config: Any) -> list[dict[str, float]]:
    """Of the newest quarter of the updates, by quarters of the response lengths: E[phi] by sign of A, and its ESS."""
    rollouts = folder / "rollouts"
    batches = [read_batch(batch_file(rollouts, step)) for step in stored_steps(rollouts)]
    table = stacked([weigh_trained(objective_of(config), batch) for batch in batches])
    table = table.rows((table.lengths > 0) & (table.advantages != 0))
    if not len(table):
        return []
    edges = np.quantile(table.lengths, np.linspace(0, 1, QUARTERS + 1))
    place = np.clip(np.searchsorted(edges, table.lengths, side="right") - 1, 0, QUARTERS - 1)
    return [_of_quarter(table.rows(place == quarter)) for quarter in range(QUARTERS) if (place == quarter).any()]


def _of_quarter(table: WeightTable) -> dict[str, float]:
    found = {
        "tokens": shortened(float(table.lengths.mean())),
        "responses": len(table),
        "ess_phi": shortened(effective_share(table.phi)),
    }
    for sign, chosen in (("positive", table.advantages > 0), ("negative", table.advantages < 0)):
        if chosen.any():
            found[f"phi_{sign}"] = shortened(float(table.phi[chosen].mean()))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # Adam's second moments reach denormals, which a CPU computes many times slower
    run_cell(Path(sys.argv[1]), Cell.named(sys.argv[2]))
