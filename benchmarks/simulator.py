"""Predictions of ``megatron-vespo plan --simulate`` beside real runs of the quickstart, all in this call.

    python benchmarks/simulator.py [--steps 14] [--only NAME ...] [--folder FOLDER] [--model FOLDER]

Synchronous runs of a small and a large batch give the rates and the lengths (plan/calibrate.py). Every other run is
predicted from its config and these alone. One trainer rank and one engine, so that on two cores an asynchronous run
has one for each. ``off by`` is predicted over measured, less 1. A run whose steps are in FOLDER already is not run
again. Meant for a machine that does nothing else: what slows down one run and not the others is an error of the
prediction here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config.load import load_config
from megatron_vespo.plan.calibrate import calibrate, measured_outcome
from megatron_vespo.plan.loops import simulate
from megatron_vespo.plan.setup import plant_of, schedule_of

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "model_configs" / "quickstart.yaml"
COMMON = (
    "cluster.ranks_per_node=1",
    "data.evaluate=null",
    "checkpoint.export_hf=false",
    "checkpoint.resume=false",
    "log.rollouts_kept=1000",
    "log.samples_per_step=0",
)
ASYNCHRONOUS = "train.mode=asynchronous"


@dataclass(frozen=True)
class Case:
    """A run: prompts a step x responses a prompt, N, and whatever else."""

    prompts: int
    responses: int
    mini_batches: int
    settings: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        return [
            f"train.prompts_per_step={self.prompts}",
            f"rollout.samples_per_prompt={self.responses}",
            f"train.mini_batches={self.mini_batches}",
            *self.settings,
        ]


CALIBRATION = {"small": Case(8, 8, 1), "large": Case(48, 8, 1)}
"""Mini-batches of 64 and 384 responses are on both sides of those predicted. Each is run before these and again
after: a virtual machine's speed drifts by more than what is measured here."""
PREDICTED = {
    "N=1": Case(32, 8, 1),
    "N=2": Case(32, 8, 2),
    "N=4": Case(32, 8, 4),
    "groups of 4": Case(32, 4, 2),
    "groups of 16": Case(32, 16, 2),
    "16 tokens": Case(32, 8, 2, ("rollout.max_response_tokens=16",)),
    "constant lag 2": Case(32, 8, 1, ("train.mode=constant_lag", "constant_lag.lag=2")),
    "async S=0": Case(32, 8, 1, (ASYNCHRONOUS, "asynchronous.max_staleness=0")),
    "async S=1": Case(32, 8, 1, (ASYNCHRONOUS, "asynchronous.max_staleness=1")),
    "async S=4 engine": Case(32, 8, 1, (ASYNCHRONOUS, "asynchronous.max_staleness=4", "train.old_logprobs=engine")),
    "async K=2 S=3 N=2": Case(32, 8, 2, (ASYNCHRONOUS, "asynchronous.sync_every=2", "asynchronous.max_staleness=3")),
    "async S=2 drop": Case(32, 8, 2, (ASYNCHRONOUS, "asynchronous.max_staleness=2", "asynchronous.too_stale=drop")),
}


def train(name: str, case: Case, folder: Path, model: Path, steps: int) -> Path:
    """The directory of the finished run."""
    run_dir = folder / name.replace(" ", "_").replace("=", "")
    if (run_dir / "metrics.jsonl").exists():
        return run_dir
    command = [sys.executable, "-m", "megatron_vespo", "train", str(CONFIG), f"run_dir={run_dir}"]
    command += [f"model.path={model}", f"data.train={model / 'train.jsonl'}", f"train.steps={steps}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([*command, *COMMON, *case.overrides], env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{name}: the run failed\n{found.stderr[-3000:]}")
    return run_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=14, help="of each run; the first two are not looked at")
    parser.add_argument("--only", nargs="+", choices=list(PREDICTED), default=list(PREDICTED))
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: nowhere)")
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "quickstart_model")
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        subprocess.run([sys.executable, "-m", "megatron_vespo.quickstart", str(options.model)], check=True)
    with tempfile.TemporaryDirectory() as temporary:
        compare(options.folder or Path(temporary), options.model.resolve(), options.steps, options.only)


def compare(folder: Path, model: Path, steps: int, names: list[str]) -> None:
    before = [train(name, case, folder, model, steps) for name, case in CALIBRATION.items()]
    run_dirs = {name: train(name, PREDICTED[name], folder, model, steps) for name in names}
    after = [train(f"{name} again", case, folder, model, steps) for name, case in CALIBRATION.items()]
    found = calibrate([*before, *after])
    print(f"rates over {found.steps} steps of {' and '.join(CALIBRATION)}:")
    print("  " + ", ".join(f"{name} {value:.3g}" for name, value in found.rates.model_dump().items() if value))
    for warning in found.warnings:
        print(f"  note: {warning}")
    print(
        f"\n{'':>20}{'samples/s':>20}{'':>9}{'trainer idle':>16}{'engine idle':>16}{'staleness mean':>18}\n"
        f"{'':>20}{'measured predicted':>20}{'off by':>9}"
        f"{'meas. pred.':>16}{'meas. pred.':>16}{'meas. pred.':>18}"
    )
    worst: dict[str, float] = {}
    for name, run_dir in run_dirs.items():
        config = load_config(run_dir / "config.resolved.yaml").run
        measured = measured_outcome(run_dir)
        ours = simulate(
            plant_of(config), schedule_of(config), found.rates, found.workload, updates=96, warmup=16, seed=1
        )
        error = ours.samples_per_s / measured.samples_per_s - 1
        worst[config.train.mode] = max(worst.get(config.train.mode, 0.0), abs(error))
        print(
            f"{name:>20}{measured.samples_per_s:>10.1f}{ours.samples_per_s:>10.1f}{error:>+9.1%}"
            f"{measured.trainer_idle:>9.1%}{ours.trainer_idle:>7.1%}{measured.engine_idle:>9.1%}"
            f"{ours.engine_idle:>7.1%}{measured.staleness_mean:>10.2f}{ours.staleness_mean:>8.2f}",
            flush=True,
        )
    print("\nworst: " + ", ".join(f"{mode} {error:.1%}" for mode, error in worst.items()))


if __name__ == "__main__":
    main()
