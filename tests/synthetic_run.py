"""A run directory with made-up but plausible numbers, for the tests of what reads one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from weighed_samples import make_samples

from megatron_vespo.objectives import build_objective
from megatron_vespo.observe.weight_health import health_metrics
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.policy.response_weights import weigh_trained
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.store import batch_file, write_batch

CONFIG = """\
name: quickstart
seed: 1
model: {path: runs/quickstart/model, dtype: float32}
parallel: {tensor: 1, pipeline: 1, context: 1, expert: 2}
objective: {name: vespo, params: {}, aggregation: token-mean, correction: none}
rollout: {engine: reference, samples_per_prompt: 8}
train: {steps: 60, prompts_per_step: 32, mini_batches: 4}
data: {train: runs/quickstart_model/train.jsonl}
"""


def step_record(step: int, steps: int, rng: np.random.Generator) -> dict[str, Any]:
    done = step / steps
    reward = 0.3 + 0.5 * (1 - math.exp(-3 * done)) + rng.normal(0, 0.03)
    return {
        **{"step": step, "version": 4 * step, "time": 1.7e9 + 4 * step, "reward": reward, "accuracy": reward},
        **{"response_length": 40 + 12 * done + rng.normal(0, 1.5), "truncated": max(0.0, 0.1 - 0.1 * done)},
        **{"loss": rng.normal(0, 0.05), "grad_norm": 1.2 + rng.gamma(2, 0.2), "lr": 1e-4},
        **{"w/mean": 1 + rng.normal(0, 0.02), "w/ess": 0.97 - rng.gamma(2, 0.01)},
        **health_metrics(weigh_trained(build_objective("vespo"), rollouts(step, 40))),
        **{"routing_mismatch_engine": 0.02 + 0.002 * rng.random(), "routing_mismatch_update": 0.03 + 0.02 * done},
        **{"staleness_mean": 1.5, "staleness_max": 3, "rollout_logprob_diff": 2e-6 * rng.gamma(5, 0.2)},
        **{"mismatch/kl": 1e-9 * rng.normal(), "mismatch/max": 2e-5 * rng.gamma(5, 0.2)},
        **{"mismatch/ppl_ratio": 1.0, "mismatch/ppl_ratio/p05": 1 - 1e-6, "mismatch/ppl_ratio/p95": 1 + 1e-6},
        **{"sync_probe_diff": 1e-6 * rng.gamma(5, 0.2), "sync_probe_k3": 1e-12 * rng.gamma(5, 0.2)},
        **{"k3_engine": 1e-11 * rng.gamma(5, 0.2), "entropy": 0.5 - 0.2 * done + rng.normal(0, 0.01)},
        **{"tokens_per_s": 900 + rng.normal(0, 40), "sync_probe_max": 5e-6 * rng.gamma(5, 0.2)},
        **{"busy/trainer": 0.7 + 0.1 * rng.random(), "busy/engines": 0.9, "queue/ready": 20 * rng.random()},
        **{"queue/open": 40, "queue/open_max": 48, "rollouts/dropped_stale": step},
        "staleness_tokens": {"0": 100, "1": 200, "3": 100},
        "timeline": timeline(step),
        "seconds": {
            **{"rollout": 2.1 + rng.normal(0, 0.2), "reward": 0.1, "old_logprobs": 0.5},
            **{"train": 1.9 + rng.normal(0, 0.1), "sync": 0.25},
        },
    }


def timeline(step: int) -> list[list[Any]]:
    start = 1.7e9 + 4 * step
    ours = [["trainer", "rollout", start, start + 1], ["trainer", "train", start + 1, start + 4]]
    return [*ours, ["engine 10", "sampling", start, start + 2], ["engine 9", "sampling", start, start + 4]]


def rollouts(step: int, count: int) -> list[Sample]:
    """A batch with a mismatch that long responses feel, and staleness that grows from update to update."""
    lengths = 1 + np.random.default_rng(step).gamma(2, 150, count).astype(int)
    return make_samples(lengths.tolist(), engine=0.03, stale=0.04, updates=4, seed=step)


def sample(step: int, index: int, text: str, gold: str, reward: float) -> Sample:
    prompt = Prompt(f"train:{index}", np.arange(12), f"<|user|>Ann has {index + 3} apples.<|assistant|>", gold, "train")
    n = 24
    return Sample(
        *(f"{step}/{prompt.id}/0", prompt, np.arange(n), np.zeros(n, np.float32)),
        weight_versions=np.array([4 * step] * 20 + [4 * step + 1] * 4),
        loss_mask=np.ones(n, bool),
        finish_reason="stop",
        text=text,
        reward=reward,
        advantage=0.7,
    )


def write_run(run_dir: Path, steps: int = 60) -> None:
    rng = np.random.default_rng(0)
    with RunWriter(run_dir) as writer:
        (run_dir / "config.resolved.yaml").write_text(CONFIG)
        writer.write({"step": 0, "eval": {"greedy": 0.31, "avg@4": 0.284, "n": 200}})
        for step in range(1, steps + 1):
            writer.write(step_record(step, steps, rng))
            if step in (1, steps):
                right = "First $3+4=7$,\nthen twice that is $14$.\nThe answer is \\boxed{14}."
                writer.write_samples(
                    step, [sample(step, 0, right, "14", 1.0), sample(step, 1, "I do not know.", "5", 0.0)]
                )
                write_batch(batch_file(run_dir / "rollouts", step), rollouts(step, 256))
            if step % 20 == 0:
                score = 0.3 + 0.5 * step / steps
                writer.write({"step": step, "eval": {"greedy": score, "avg@4": score - 0.03, "n": 200}})
