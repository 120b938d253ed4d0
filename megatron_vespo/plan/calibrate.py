"""Rates measured in finished runs whose loop takes turns, from metrics.jsonl (seconds by phase) and the stored rollouts
(true lengths).

A phase's seconds are linear in what it had to do: decode steps, tokens, responses, passes. Each is fitted over the
steps of all runs given, by least absolute relative deviations with no coefficient below 0, so that a step in which the
machine was busy elsewhere does not count for more than another. One run whose steps are all alike cannot tell a fixed
cost from one that grows with the batch; two runs of different size can (:attr:`Calibration.warnings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.observe.records import Record, read_records
from megatron_vespo.plan.clock import Clock
from megatron_vespo.plan.engine import Group
from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.pool import Pool
from megatron_vespo.plan.rates import Rates
from megatron_vespo.plan.setup import Plant, Schedule, plant_of
from megatron_vespo.plan.workload import GroupShape, MeasuredLengths, groups_of
from megatron_vespo.samples.store import StoreError, batch_file, read_batch, stored_steps

WARMUP_STEPS = 2
"""Of a run, in which kernels are compiled and caches filled: not looked at."""
FAR = 1.5
"""Beyond what was measured by more than this factor, a time is said to be extrapolated."""
UNIT = Rates(decode_step=1.0, decode_response=0.0, train_token=0.0)


@dataclass(frozen=True)
class MeasuredStep:
    """One step of a run, in what it had to do and how long that took."""

    mode: str
    """train.mode."""
    seconds: dict[str, float]
    """By phase; ``driver``: what was outside them, where no evaluation and no checkpoint came in between."""
    groups: list[GroupShape]
    updates: int
    decode_steps: float
    """Of the engine that had the most."""
    decode_responses: float
    """Tokens that it decoded."""
    prefill_tokens: float
    replica_tokens: float
    """Tokens of the fullest data-parallel replica over the GPUs that hold it, summed over the updates."""
    staleness: np.ndarray
    """[lags] response tokens trained."""
    engine_busy: float
    """Share of the step in which an engine had requests."""
    dropped: int
    """Prompt groups dropped for their staleness since the run began."""

    @property
    def responses(self) -> int:
        return sum(len(group.responses) for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Calibration:
    rates: Rates
    workload: MeasuredLengths
    steps: int
    """Steps that were looked at."""
    update_tokens: tuple[float, float] = (0.0, np.inf)
    """The fewest and the most tokens a trainer GPU had in an update that was looked at."""
    warnings: list[str] = field(default_factory=list)

    def beyond(self, plant: Plant, schedule: Schedule) -> str | None:
        """A warning where the updates of ``schedule`` are much smaller or larger than those that were measured."""
        groups = self.workload.groups
        lengths = [group.prompt + np.minimum(group.responses, schedule.longest).mean() for group in groups]
        tokens = schedule.groups * schedule.size * float(np.mean(lengths)) / plant.trainer_gpus
        least, most = self.update_tokens
        if least / FAR <= tokens <= most * FAR:
            return None
        return (
            f"an update of the config is about {tokens:,.0f} tokens a trainer GPU, those measured {least:,.0f} to "
            f"{most:,.0f}: what is fixed and what grows with them is extrapolated. Add a run with such ones to --from"
        )


def calibrate(run_dirs: Sequence[Path]) -> Calibration:
    """Raises ConfigError where a folder is no run or keeps no rollouts, or where engines and trainer worked side by
    side in all of them, so that their phases do not tell how fast each is."""
    steps = [step for run_dir in run_dirs for step in measured_steps(run_dir) if step.mode != "asynchronous"]
    if not steps:
        raise ConfigError(
            f"{run_dirs[0]}: engines and trainer worked side by side in it, so that its phases do not tell how fast "
            "either is; add a synchronous run of the same model: --from SYNCHRONOUS_RUN RUN_DIR"
        )
    warnings: list[str] = []

    def fit(phase: str, **columns: list[float]) -> list[float]:
        """Seconds of ``phase`` by one unit of each column."""
        having = [i for i, step in enumerate(steps) if phase in step.seconds]
        if not having:
            return [0.0] * len(columns)
        work = np.array(list(columns.values()), float).T[having]
        seconds = np.array([steps[i].seconds[phase] for i in having])
        work /= np.maximum(seconds, 1e-9)[:, None]  # relative: a small batch counts for as much as a large one
        if tells_apart(work):
            return fit_absolute(work, np.ones(len(having))).tolist()
        warnings.append(
            f"{phase}: all steps are about the same size, so that what is fixed and what grows with it cannot be told "
            f"apart; all is laid on {list(columns)[-1]}. Add a run with another batch: --from RUN_DIR RUN_DIR"
        )
        return [0.0] * (len(columns) - 1) + fit_absolute(work[:, -1:], np.ones(len(having))).tolist()

    if not any("old log-probs" in step.seconds for step in steps):
        warnings.append(
            "old log-probs: computed in none of these runs (train.old_logprobs = engine), so that they are taken to "
            "cost nothing. For a config that computes them add a run that does: --from RUN_DIR RUN_DIR"
        )
    ones = [1.0] * len(steps)
    updates = [float(step.updates) for step in steps]
    tokens = [step.replica_tokens for step in steps]
    responses = [float(step.responses) for step in steps]
    # A prompt's token is laid on as much as a decoded one costs in a full batch: their numbers grow together from step
    # to step, so that a fit would share them out by chance.
    decode_step, decode_token = fit(
        "rollout",
        decode_steps=[step.decode_steps for step in steps],
        tokens=[step.decode_responses + step.prefill_tokens for step in steps],
    )
    old_pass, old_token = fit("old log-probs", passes=updates, tokens=tokens)
    update, train_token = fit("train", updates=updates, tokens=tokens)
    reward_batch, reward_response = fit("reward", batches=ones, responses=responses)
    driver, driver_response = fit("driver", steps=ones, responses=responses)
    config = _config_of(run_dirs[0])
    rates = Rates(
        decode_step=decode_step,
        decode_response=decode_token,
        prefill_token=decode_token,
        max_running=max_running(config),
        reward_batch=reward_batch,
        reward_response=reward_response,
        old_logprobs_pass=old_pass,
        old_logprobs_token=old_token,
        update=update,
        train_token=train_token,
        sync=float(np.median([step.seconds.get("sync", 0.0) for step in steps])),
        step=driver,
        step_response=driver_response,
    )
    workload = MeasuredLengths([group for step in steps for group in step.groups])
    per_update = [step.replica_tokens / step.updates for step in steps]
    return Calibration(rates, workload, len(steps), (min(per_update), max(per_update)), warnings)


def measured_outcome(run_dir: Path) -> Outcome:
    """What a run did in :func:`measured_steps`, all of them together."""
    steps = measured_steps(run_dir)
    seconds = sum(step.total_s for step in steps)

    def share(*phases: str) -> float:
        return sum(step.seconds.get(phase, 0.0) for step in steps for phase in phases) / seconds

    lags = np.zeros(max(len(step.staleness) for step in steps), np.int64)
    for step in steps:
        lags[: len(step.staleness)] += step.staleness
    groups, dropped = sum(len(step.groups) for step in steps[1:]), steps[-1].dropped - steps[0].dropped
    return Outcome(
        seconds=seconds,
        updates=sum(step.updates for step in steps),
        samples=sum(step.responses for step in steps),
        tokens=sum(step.tokens for step in steps),
        staleness=lags,
        trainer_idle=share("wait", "rollout", "reward", "driver"),
        trainer_sync=share("sync"),
        engine_idle=1 - sum(step.engine_busy * step.total_s for step in steps) / seconds,
        engine_running=None,
        dropped=dropped / max(1, groups + dropped),
        late=0.0,
    )


# ------------------------------------------------------------------------------------------------------ one run's steps


def measured_steps(run_dir: Path) -> list[MeasuredStep]:
    """The steps of a run whose rollouts it kept, without its first :data:`WARMUP_STEPS` and, where it is asynchronous,
    its last, for which nothing more was asked."""
    records = read_records(run_dir / "metrics.jsonl")
    if not records:
        raise ConfigError(f"{run_dir}: no metrics.jsonl there, or nothing in it; give the directory of a run")
    config = _config_of(run_dir)
    folder = run_dir / "rollouts"
    stored = set(stored_steps(folder))
    found = []
    wanted = range(WARMUP_STEPS + 1, config.train.steps - drained_steps(config) + 1)
    for before, record in pairwise(records):
        if "eval" in record or record["step"] not in stored or record["step"] not in wanted:
            continue
        seconds = dict(record["seconds"])
        if "eval" not in before and "checkpoint" not in seconds:
            seconds["driver"] = max(0.0, record["time"] - before["time"] - sum(seconds.values()))
        found.append(_measured_step(config, batch_file(folder, record["step"]), record, seconds))
    if not found:
        raise ConfigError(
            f"{folder}: no stored rollouts of a step after the {WARMUP_STEPS}nd; a run keeps its newest where "
            "log.rollouts_kept > 0"
        )
    return found


def drained_steps(config: RunConfig) -> int:
    """Steps at the end of a run in which engines have nothing more to sample."""
    if config.train.mode != "asynchronous":
        return 0
    return -(-(config.asynchronous.max_staleness + 1) // config.train.mini_batches)


def _measured_step(config: RunConfig, path: Path, record: Record, seconds: dict[str, float]) -> MeasuredStep:
    try:
        samples = read_batch(path)
    except StoreError as error:
        raise ConfigError(str(error)) from None
    plant = plant_of(config)
    by_update: dict[int, list[int]] = {}
    lags: list[np.ndarray] = []
    for sample in samples:
        version = sample.trained_version or 0
        by_update.setdefault(version, []).append(sample.length)
        lags.append(version - sample.weight_versions[sample.loss_mask])
    groups = groups_of(samples)
    total = sum(seconds.values())
    busy = record.get("busy/engines")
    return MeasuredStep(
        mode=config.train.mode,
        seconds=seconds,
        groups=groups,
        updates=len(by_update),
        replica_tokens=sum(
            max(sum(lengths) / plant.replicas, max(lengths)) / plant.replica_gpus for lengths in by_update.values()
        ),
        staleness=np.bincount(np.concatenate(lags)),
        # Of the phases' time; nothing is sampled outside them where the loop takes turns.
        engine_busy=seconds.get("rollout", 0.0) / total if busy is None else busy,
        dropped=int(record.get("rollouts/dropped_stale", 0)),
        **decode_work(groups, plant, max_running(config)),
    )


def decode_work(groups: Sequence[GroupShape], plant: Plant, running: int) -> dict[str, float]:
    """What a rollout batch asks of the engine that has the most decode steps to do."""
    clock = Clock()
    longest = max(int(group.responses.max()) for group in groups)
    pool = Pool(
        clock,
        UNIT.model_copy(update={"max_running": running}),
        engines=plant.engines,
        in_flight=plant.in_flight,
        longest=longest,
        done=lambda groups: None,
    )
    pool.submit([Group(number, shape) for number, shape in enumerate(groups)])
    clock.run()
    busiest = max(pool.engines, key=lambda engine: engine.progress)
    share = busiest.response_steps / max(1.0, sum(engine.response_steps for engine in pool.engines))
    return {
        "decode_steps": busiest.progress,
        "decode_responses": busiest.response_steps,
        "prefill_tokens": share * sum(group.prompt for group in groups),
    }


def max_running(config: RunConfig) -> int:
    """Responses an engine decodes together: its flag, or the reference engine's default; SGLang's depends on memory."""
    flags = {name.replace("_", "-").removeprefix("--"): value for name, value in config.rollout.engine_args.items()}
    return int(flags.get("max-running-requests", Rates.model_fields["max_running"].default))


def _config_of(run_dir: Path) -> RunConfig:
    return load_config(run_dir / "config.resolved.yaml").run


# --------------------------------------------------------------------------------------------------------------- fits


def fit_absolute(work: np.ndarray, seconds: np.ndarray, rounds: int = 50) -> np.ndarray:
    """[columns] >= 0 that minimise sum |seconds - work @ x|, to about 1e-6 of the scale: least squares, reweighted."""
    scale = np.abs(work).max(0)
    scale[scale == 0] = 1.0
    found = fit_squares(work / scale, seconds)
    for _ in range(rounds):
        weight = 1 / np.sqrt(np.maximum(np.abs(seconds - work / scale @ found), 1e-6 * max(1e-12, seconds.max())))
        found = fit_squares(work / scale * weight[:, None], seconds * weight)
    return found / scale


def fit_squares(work: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares with no coefficient below 0: the best of all choices of the columns that count (they are few)."""
    columns = work.shape[1]
    best, least = np.zeros(columns), float(seconds @ seconds)
    for count in range(1, columns + 1):
        for chosen in combinations(range(columns), count):
            found = np.linalg.lstsq(work[:, chosen], seconds, rcond=None)[0]
            error = float(((work[:, chosen] @ found - seconds) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(columns), error
                best[list(chosen)] = found
    return best


def tells_apart(work: np.ndarray) -> bool:
    """Whether the ratio of any two columns varies by a fifth over the steps."""
    ratios = work[:, 1:] / np.maximum(work[:, :1], 1e-12)
    return bool((ratios.max(0) > 1.2 * ratios.min(0)).any())
