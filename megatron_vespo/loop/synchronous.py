"""Synchronous training: one rollout batch at a time, cut into N mini-batches (split staleness 0..N-1)."""

from __future__ import annotations

from megatron_vespo.loop.collect import collect
from megatron_vespo.loop.evaluate import evaluate, evaluation_due
from megatron_vespo.loop.record import record_step
from megatron_vespo.loop.run import Run
from megatron_vespo.samples.records import Sample


def train(run: Run) -> None:
    """From where the run stands to ``train.steps``."""
    config = run.config
    if run.step == 0:
        evaluate(run)

    while run.step < config.train.steps:
        samples = collect(run, run.step)
        run.assign_advantages(samples)
        mini_batches = split(samples, config.train.mini_batches)
        run.find_old_logprobs(mini_batches)
        for mini_batch in mini_batches:
            with run.phase("train"):
                run.update_policy(mini_batch)
        run.step += 1

        with run.phase("sync"):
            run.sync_weights()
        record_step(run, samples)
        if evaluation_due(run):
            evaluate(run)
        if run.checkpoint_due:
            run.save_checkpoint()
        run.stop_if_asked()

    evaluate(run)
    run.finish()


def split(samples: list[Sample], parts: int) -> list[list[Sample]]:
    """Whole prompt groups, in order; the config has checked that the count divides."""
    size = len(samples) // parts
    return [samples[i : i + size] for i in range(0, len(samples), size)]
