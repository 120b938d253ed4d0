"""Held-out accuracy: greedy, and avg@k at a temperature."""

from __future__ import annotations

from megatron_vespo.loop.record import record_evaluation
from megatron_vespo.loop.run import Run


def evaluate(run: Run) -> dict[str, float]:
    """Sample the held-out problems twice, grade, record. Returns {} where the run has none."""
    config, held_out = run.config.evaluate, run.held_out
    if not held_out:
        return {}
    k = config.samples_per_prompt
    with run.phase("evaluate"):
        greedy = run.sample(held_out, run.sampling(temperature=0.0), 1, step=run.step, batch="greedy")
        sampling = run.sampling(config.temperature, config.top_p)
        drawn = run.sample(held_out, sampling, k, step=run.step, batch=f"avg@{k}")
        run.score(greedy)
        run.score(drawn)
    result = {
        "greedy": sum(s.grade or 0.0 for s in greedy) / len(greedy),
        f"avg@{k}": sum(s.grade or 0.0 for s in drawn) / len(drawn),
        "n": len(held_out),
    }
    record_evaluation(run, result)
    return result
