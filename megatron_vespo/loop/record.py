"""What a step leaves behind: a line of metrics.jsonl and of the screen, a few samples to read, the batch itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_vespo.loop.run import Run
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.observe.mismatch import mismatch_metrics
from megatron_vespo.observe.problems import Problem, write_problems
from megatron_vespo.observe.timing import Span, seconds_by_phase, timeline
from megatron_vespo.observe.weight_health import health_metrics
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.staleness import lag_counts
from megatron_vespo.samples.store import batch_file, keep_newest, write_batch
from megatron_vespo.samples.weight_table import stacked

WORK = ("old log-probs", "train")
"""The phases in which the trainer computes."""


def record_step(run: Run, samples: Sequence[Sample], extra: Mapping[str, float] | None = None) -> None:
    """``samples``: those trained in this step. ``extra``: what only the loop knows."""
    run.engine_weights.keep_probe(samples)
    times = _take_times(run)
    response_tokens = sum(len(s.response_tokens) for s in samples)
    record = {
        "step": run.step,
        "version": run.version,
        "time": time.time(),
        "reward": float(np.mean([s.reward for s in samples])),
        "accuracy": float(np.mean([(s.grade or 0.0) >= 1.0 for s in samples])),
        **_reward_parts(samples),
        "reward_errors": sum("reward_error" in s.metadata for s in samples),
        "response_length": response_tokens / len(samples),
        "truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
        "tokens_per_s": sum(s.length for s in samples) / sum(times["seconds"].values()),
        **run.metrics.means(),
        **_ratio_metrics(run, samples),
        **run.engines.pool.take_counts(),
        **run.turns.take(),
        **(extra or {}),
        "staleness_tokens": lag_counts(samples),
        **times,
    }
    run.metrics, run.weights = MetricSums(), []
    run.writer.write(record)
    run.writer.write_samples(run.step, samples[: run.config.log.samples_per_step])
    if run.config.log.rollouts_kept:
        folder = run.config.directory / "rollouts"
        write_batch(batch_file(folder, run.step), samples)
        keep_newest(folder, run.config.log.rollouts_kept)
    run.progress.step(record)


def _reward_parts(samples: Sequence[Sample]) -> dict[str, float]:
    """``reward/<label>`` of each part of a reward of several: mean, unweighted, over the samples that it applies to."""
    sums = MetricSums()
    for sample in samples:
        for label, value in sample.metadata.get("reward_parts", {}).items():
            sums.add(f"reward/{label}", value, 1.0)
    return sums.means()


def record_evaluation(run: Run, result: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> None:
    """``intervals``: of some of the result's scores, by their names."""
    record = {
        "step": run.step,
        "version": run.version,
        "time": time.time(),
        "eval": result,
        "intervals": intervals,
        **_take_times(run),  # taking them keeps the evaluation's out of the next step's
    }
    run.writer.write(record)
    run.progress.evaluation(record)


def record_problems(run: Run, name: str, problems: Sequence[Problem]) -> None:
    """``evaluations/<set>/step_000100.jsonl``, a line a problem."""
    write_problems(run.config.directory / "evaluations" / name / f"step_{run.step:06d}.jsonl", problems)


def _take_times(run: Run) -> dict[str, Any]:
    """Since the last record: seconds by phase of the trainer; the share of them in which it computes, and in which an
    engine has requests (mean over the engines); the timeline of both."""
    spans, busy = run.timer.take(), run.engines.pool.take_busy()
    seconds = seconds_by_phase(spans)
    wall = sum(seconds.values())
    return {
        "busy/trainer": sum(seconds.get(phase, 0.0) for phase in WORK) / wall,
        "busy/engines": sum(span.end - span.start for span in busy) / (run.config.rollout.engine_count * wall),
        "timeline": timeline(
            [("trainer", span) for span in spans]
            + [(f"engine {s.engine}", Span("sampling", s.start, s.end)) for s in busy]
        ),
        "seconds": seconds,
    }


def _ratio_metrics(run: Run, samples: Sequence[Sample]) -> dict[str, float]:
    """Of the sequence weights, and of the engine's mismatch where that can be told from staleness."""
    health = health_metrics(stacked(run.weights))
    if run.config.knows_old_policy:
        return health | mismatch_metrics(samples)
    return {name: value for name, value in health.items() if not any(part in name for part in ("_stale", "_engine"))}
