"""What ``megatron-vespo plan --simulate`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_vespo.plan.outcome import Outcome
from megatron_vespo.plan.recommend import Candidate
from megatron_vespo.plan.setup import Plant, Schedule

HEAD = (
    f"{'rollout + trainer':>18}{'sync':>6}{'samples/s':>11}{'tokens/s':>11}{'updates/h':>11}"
    f"{'trainer':>9}{'engines':>9}{'running':>9}{'staleness':>18}{'dropped':>9}"
)
BELOW = f"{'GPUs':>18}{'every':>6}{'':33}{'idle':>9}{'idle':>9}{'an engine':>10}{'mean p95 max':>17}"


def describe(plant: Plant, schedule: Schedule) -> str:
    update = f"{schedule.groups} x {schedule.size} responses an update"
    if schedule.mode == "synchronous":
        return f"synchronous, N = {schedule.mini_batches}, {update}"
    if schedule.mode == "constant_lag":
        return f"constant lag {schedule.lag}, {update}"
    bound = "" if schedule.max_open is None else f", at most {schedule.max_open} groups open"
    return (
        f"asynchronous, {update}, sync every {schedule.sync_every} updates, staleness at most "
        f"{schedule.max_staleness} ({schedule.too_stale}){bound}"
    )


def table(candidates: Sequence[Candidate], best: Candidate | None = None) -> str:
    lines = [HEAD, BELOW, *(row(candidate, candidate is best) for candidate in candidates)]
    if any(candidate.schedule.too_stale == "down_weight" for candidate in candidates):
        lines.append("* not dropped: trained with less weight")
    return "\n".join(lines)


def row(candidate: Candidate, best: bool = False) -> str:
    plant, outcome = candidate.plant, candidate.outcome
    split = f"{plant.gpus} shared" if plant.shared else f"{plant.rollout_gpus} + {plant.trainer_gpus}"
    every = candidate.schedule.sync_every if candidate.schedule.mode == "asynchronous" else "step"
    staleness = f"{outcome.staleness_mean:.2f} {outcome.staleness_p95:>3} {outcome.staleness_max:>3}"
    late = candidate.schedule.too_stale == "down_weight"
    lost = f"{outcome.late:.1%}*" if late else f"{outcome.dropped:.1%}"
    return (
        f"{split:>18}{every:>6}{outcome.samples_per_s:>11.4g}{outcome.tokens_per_s:>11,.0f}"
        f"{outcome.updates_per_hour:>11.4g}{outcome.trainer_idle:>9.1%}{outcome.engine_idle:>9.1%}"
        f"{outcome.engine_running or 0.0:>9.1f}{staleness:>18}{lost:>9}" + ("  <- recommended" if best else "")
    )


def beside(predicted: Outcome, measured: Outcome) -> str:
    """Prediction, measurement, and what the first is off by."""
    rows = [
        ("samples/s", predicted.samples_per_s, measured.samples_per_s),
        ("tokens/s", predicted.tokens_per_s, measured.tokens_per_s),
        ("updates/h", predicted.updates_per_hour, measured.updates_per_hour),
        ("trainer idle", predicted.trainer_idle, measured.trainer_idle),
        ("engines idle", predicted.engine_idle, measured.engine_idle),
        ("staleness mean", predicted.staleness_mean, measured.staleness_mean),
        ("staleness max", predicted.staleness_max, measured.staleness_max),
    ]
    lines = [f"{'':>16}{'predicted':>12}{'measured':>12}{'off by':>10}"]
    for name, ours, theirs in rows:
        share = name.endswith("idle")
        off = f"{100 * (ours - theirs):+.1f} pt" if share else f"{ours / theirs - 1:+.1%}" if theirs else "-"
        lines.append(f"{name:>16}{ours:>12.4g}{theirs:>12.4g}{off:>10}")
    return "\n".join(lines)


def numbers(candidate: Candidate, best: bool = False) -> dict[str, Any]:
    """For JSON."""
    plant, schedule = candidate.plant, candidate.schedule
    return {
        "rollout_gpus": plant.rollout_gpus,
        "trainer_gpus": plant.trainer_gpus,
        "shared": plant.shared,
        "engines": plant.engines,
        "replicas": plant.replicas,
        "mode": schedule.mode,
        "mini_batches": schedule.mini_batches,
        "sync_every": schedule.sync_every,
        "max_staleness": schedule.max_staleness,
        "scale": candidate.scale,
        "recommended": best,
        **candidate.outcome.summary(),
    }
