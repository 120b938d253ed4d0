"""``megatron-vespo plan CONFIG --simulate``: rates from a run or a file, every split simulated, one recommended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.plan.calibrate import Calibration, calibrate, measured_outcome
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.rates import Assumptions, Rates, change_rates, load_assumptions
from megatron_vespo.plan.recommend import Candidate, Forecast, recommended
from megatron_vespo.plan.setup import plant_of, replica_step, schedule_of
from megatron_vespo.plan.tables import beside, describe, numbers, table


@dataclass(frozen=True)
class Page:
    """All that was simulated and measured."""

    origin: str
    """Of the rates."""
    rates: Rates
    gpus: int
    own: Candidate
    """The config's own split."""
    splits: list[Candidate]
    split: Candidate
    """The best of them."""
    intervals: list[Candidate]
    """Sync intervals at that split; empty where the loop has none."""
    best: Candidate
    references: list[Candidate]
    """The synchronous loop on as many GPUs, where the config's is asynchronous."""
    runs: dict[str, tuple[Outcome, Outcome]]
    """Run directory -> (predicted, measured)."""


def simulate_plan(
    config: RunConfig,
    *,
    run_dirs: Sequence[Path] = (),
    rates_file: Path | None = None,
    assumptions: Sequence[str] = (),
    gpus: int | None = None,
    seed: int = 0,
) -> Page:
    """assumptions: ``rates.sync=20`` and the like. Raises ConfigError."""
    source = _source(run_dirs, rates_file, assumptions)
    plant, schedule = plant_of(config), schedule_of(config)
    if isinstance(source, Calibration) and (warning := source.beyond(plant, schedule)):
        source = replace(source, warnings=[*source.warnings, warning])
    forecast = Forecast(source.rates, source.workload if isinstance(source, Calibration) else source.lengths, seed=seed)
    gpus = gpus or plant.gpus
    try:
        own = forecast.of(plant, schedule)
        splits = forecast.splits(gpus, plant, schedule, step=replica_step(config))
        split = recommended(splits)
        intervals = forecast.intervals(split.plant, schedule)
        return Page(
            origin=_origin(source, run_dirs, rates_file),
            rates=source.rates,
            gpus=gpus,
            own=own,
            splits=splits,
            split=split,
            intervals=intervals,
            best=recommended(intervals) if intervals else split,
            references=_references(forecast, gpus, split),
            runs={str(run_dir): (_predicted(forecast, run_dir), measured_outcome(run_dir)) for run_dir in run_dirs},
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def as_text(page: Page) -> str:
    plant, schedule = page.best.plant, page.best.schedule
    blocks = [
        page.origin,
        f"the config: {describe(page.own.plant, page.own.schedule)}\n{table([page.own])}",
        f"{page.gpus} GPUs, split\n{table(page.splits, page.split)}",
    ]
    if page.intervals:
        blocks.append(f"sync intervals at that split\n{table(page.intervals, page.best)}")
    if page.references:
        blocks.append(f"the synchronous loop on as many GPUs\n{table(page.references)}")
    interval = f", asynchronous.sync_every={schedule.sync_every}" if page.intervals else ""
    blocks.append(
        f"recommended: {plant.rollout_gpus} GPUs for {plant.engines} engine(s), {plant.trainer_gpus} for the trainer"
        + interval
    )
    blocks += [f"{run_dir}\n{beside(*outcomes)}" for run_dir, outcomes in page.runs.items()]
    scale = max(candidate.scale for candidate in (page.own, *page.splits, *page.intervals, *page.references))
    if scale > 1:
        blocks.append(f"Simulated in small, down to 1 : {scale:.3g} (docs/simulator.md says what that leaves out).")
    return "\n\n".join(blocks)


def as_json(page: Page) -> str:
    return json.dumps(
        {
            "gpus": page.gpus,
            "rates": page.rates.model_dump(),
            "config": numbers(page.own),
            "splits": [numbers(candidate, candidate is page.split) for candidate in page.splits],
            "sync_intervals": [numbers(candidate, candidate is page.best) for candidate in page.intervals],
            "references": [numbers(candidate) for candidate in page.references],
            "recommended": numbers(page.best, True),
            "runs": {
                run_dir: {"predicted": predicted.summary(), "measured": measured.summary()}
                for run_dir, (predicted, measured) in page.runs.items()
            },
        },
        indent=2,
        allow_nan=False,
    )


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
        old_passes="none" if best.schedule.old_passes == "none" else "one",
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


def _predicted(forecast: Forecast, run_dir: Path) -> Outcome:
    config = load_config(run_dir / "config.resolved.yaml").run
    return forecast.of(plant_of(config), schedule_of(config)).outcome
