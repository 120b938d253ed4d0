"""What rollout and training side by side gain over taking turns, against what they could gain at most.

    python -m megatron_vespo.quickstart runs/quickstart_model
    python benchmarks/async_speedup.py [--model runs/quickstart_model] [--steps 24] [--staleness 2] [key=value ...]

Two runs of the same updates on the same processes' layout, one engine and one trainer rank with a core each: one
synchronous, one asynchronous. Of each step of the synchronous run the time to generate (rollout and reward), to train
(old log-probs and update) and to sync is measured. Side by side a step takes at least

    max(T_generate, T_train + T_sync),

as the trainer does the syncs, so that the speed-up is at most (T_generate + T_train + T_sync) over that; without the
cost of a sync it would be (T_generate + T_train) / max(T_generate, T_train). The asynchronous run's step is the wall
time from record to record. Warm-up steps are left out of both. The machine must be quiet: the bound supposes that the
two sides do not take each other's core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

WARM_UP = 4
"""Steps left out at the beginning: engines and trainer grow their buffers, and the queue fills."""


def settings(model: Path, folder: Path, steps: int) -> dict[str, Any]:
    return {
        "name": "async_speedup",
        "run_dir": str(folder),
        "model": {"path": str(model), "dtype": "float32"},
        "rollout": {"engine": "reference", "precision": "fp32", "samples_per_prompt": 8, "max_response_tokens": 48},
        "data": {"train": str(model / "train.jsonl"), "max_prompt_tokens": 128},
        "reward": {"workers": 1},
        "train": {"steps": steps, "prompts_per_step": 16},
        "optimizer": {"lr": 1e-5},
        "checkpoint": {"export_hf": False},
        "cluster": {"ranks_per_node": 1},
        "sync": {"transport": "shared_memory"},
        "log": {"rollouts_kept": 0, "samples_per_step": 0},
    }


def run(config: dict[str, Any], overrides: list[str]) -> list[dict[str, Any]]:
    """The records of its steps, without the warm-up."""
    folder = Path(config["run_dir"])
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "megatron_vespo", "train", str(path), *overrides]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval" not in record]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of both runs, such as train.prompts_per_step=32"
    )
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart_model"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--staleness", type=int, default=2, help="asynchronous.max_staleness")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        turns = run(settings(options.model, Path(folder) / "synchronous", options.steps), options.overrides)
        mode = ["train.mode=asynchronous", f"asynchronous.max_staleness={options.staleness}"]
        beside = run(settings(options.model, Path(folder) / "asynchronous", options.steps), [*options.overrides, *mode])

    def seconds(records: list[dict[str, Any]], *phases: str) -> float:
        return mean(sum(record["seconds"].get(phase, 0.0) for phase in phases) for record in records[WARM_UP:])

    generate = seconds(turns, "rollout", "reward")
    train, sync = seconds(turns, "old log-probs", "train"), seconds(turns, "sync")
    step = (beside[-1]["time"] - beside[WARM_UP - 1]["time"]) / (len(beside) - WARM_UP)
    whole = generate + train + sync
    bound = whole / max(generate, train + sync)
    busy = {name: mean(record[f"busy/{name}"] for record in beside[WARM_UP:]) for name in ("trainer", "engines")}
    print(f"synchronous   {whole:7.3f} s a step: generate {generate:.3f}, train {train:.3f}, sync {sync:.3f}")
    shares = f"trainer computes {busy['trainer']:.0%}, engine works {busy['engines']:.0%}"
    print(f"asynchronous  {step:7.3f} s a step; {shares}")
    print(f"speed-up      {whole / step:7.2f}")
    print(f"bound         {bound:7.2f}   (generate + train + sync) / max(generate, train + sync)")
    print(f"              {(generate + train) / max(generate, train):7.2f}   if a sync cost nothing")
    print(f"reached       {whole / step / bound:7.0%}   of the bound")


if __name__ == "__main__":
    main()
