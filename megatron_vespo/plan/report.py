"""``megatron-vespo plan CONFIG --simulate``: rates from a run or a file, every split simulated, one recommended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.plan.calibrate import Calibration, calibrate, measured_outcome
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.rates import Assumptions, change_rates, load_assumptions
from megatron_vespo.plan.recommend import Candidate, Forecast, recommended
from megatron_vespo.plan.setup import plant_of, replica_step, schedule_of
from megatron_vespo.plan.tables import as_json, beside, describe, table


def simulate_plan(
    config: RunConfig,
    *,
    run_dirs: Sequence[Path] = (),
    rates_file: Path | None = None,
    assumptions: Sequence[str] = (),
    gpus: int | None = None,
    seed: int = 0,
    as_text: bool = True,
) -> str:
    """The page, or JSON. assumptions: ``rates.sync=20`` and the like. Raises ConfigError."""
    source = _source(run_dirs, rates_file, assumptions)
    forecast = Forecast(source.rates, source.workload if isinstance(source, Calibration) else source.lengths, seed=seed)
    plant, schedule = plant_of(config), schedule_of(config)
    try:
        own = forecast.of(plant, schedule)
        splits = forecast.splits(gpus or plant.gpus, plant, schedule, step=replica_step(config))
        best = recommended(splits)
        intervals = forecast.intervals(best.plant, schedule)
        chosen = recommended(intervals) if intervals else best
        others = _references(forecast, gpus or plant.gpus, best)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    measured = {str(run_dir): measured_outcome(run_dir) for run_dir in run_dirs}
    if not as_text:
        page: dict[str, Any] = {
            "gpus": gpus or plant.gpus,
            "rates": source.rates.model_dump(),
            "config": as_json(own),
            "splits": [as_json(candidate, candidate is best) for candidate in splits],
            "sync_intervals": [as_json(candidate, candidate is chosen) for candidate in intervals],
            "references": [as_json(candidate) for candidate in others],
            "recommended": as_json(chosen, True),
            "measured": {name: outcome.summary() for name, outcome in measured.items()},
        }
        return json.dumps(page, indent=2)

    blocks = [_origin(source, run_dirs, rates_file)]
    blocks += [f"the config: {describe(plant, schedule)}\n{table([own])}"]
    blocks += [f"{gpus or plant.gpus} GPUs, split\n{table(splits, best)}"]
    if intervals:
        blocks += [f"sync intervals at that split\n{table(intervals, chosen)}"]
    if others:
        blocks += [f"the synchronous loop on as many GPUs\n{table(others)}"]
    blocks += [
        f"recommended: {chosen.plant.rollout_gpus} GPUs for {chosen.plant.engines} engine(s), "
        f"{chosen.plant.trainer_gpus} for the trainer"
        + (f", asynchronous.sync_every={chosen.schedule.sync_every}" if intervals else "")
    ]
    for run_dir in run_dirs:
        blocks += [_prediction(forecast, run_dir, measured[str(run_dir)])]
    scale = max(candidate.scale for candidate in (own, *splits, *intervals, *others))
    if scale > 1:
        blocks += [f"Simulated in small, down to 1 : {scale:.3g} (docs/simulator.md says what that leaves out)."]
    return "\n\n".join(blocks)


def _source(run_dirs: Sequence[Path], rates_file: Path | None, assumptions: Sequence[str]) -> Calibration | Assumptions:
    if bool(run_dirs) == (rates_file is not None):
        raise ConfigError(
            "give either --from, a finished run (or several) whose rates are measured, or --rates, a file of stated "
            "ones such as model_configs/rates/h20_qwen3_30b_a3b.yaml"
        )
    if rates_file is not None:
        return load_assumptions(rates_file, assumptions)
    found = calibrate(run_dirs)
    return replace(found, rates=change_rates(found.rates, assumptions))


def _references(forecast: Forecast, gpus: int, best: Candidate) -> list[Candidate]:
    """What the synchronous loop would do: at the same split, and taking turns on all GPUs."""
    if best.schedule.mode != "asynchronous":
        return []
    plant = best.plant
    schedule = replace(
        best.schedule,
        mode="synchronous",
        sync_every=1,
        max_staleness=0,
        too_stale="wait",
        max_open=None,
        old_passes="one",
    )
    shared = replace(plant, engines=gpus // plant.engine_gpus, replicas=gpus // plant.replica_gpus, shared=True)
    return [forecast.of(plant, schedule), forecast.of(shared, schedule)]


def _origin(source: Calibration | Assumptions, run_dirs: Sequence[Path], rates_file: Path | None) -> str:
    rates = ", ".join(f"{name} {value:.3g}" for name, value in source.rates.model_dump().items() if value)
    if isinstance(source, Assumptions):
        return f"rates of {rates_file}, stated: {rates}"
    runs = ", ".join(str(run_dir) for run_dir in run_dirs)
    return "\n".join(
        [f"rates measured over {source.steps} steps of {runs}: {rates}", *(f"note: {w}" for w in source.warnings)]
    )


def _prediction(forecast: Forecast, run_dir: Path, measured: Outcome) -> str:
    config = load_config(run_dir / "config.resolved.yaml").run
    own = forecast.of(plant_of(config), schedule_of(config))
    return f"{run_dir}\n{beside(own.outcome, measured)}"
