"""Constant lag k: the rollout batch of update t is sampled by the weights of version t - k, the first k by version 0.

A regime to experiment in (M2PO, VCPO and OAPL report theirs in it), not a way to be fast: sampling and training take
turns, so that the lag of every token of an update is the same and known.
"""

from __future__ import annotations

from collections import deque

from megatron_vespo.loop.collect import collect
from megatron_vespo.loop.evaluate import evaluate, evaluation_due
from megatron_vespo.loop.record import record_step
from megatron_vespo.loop.run import Run
from megatron_vespo.samples.records import Sample


def train(run: Run) -> None:
    """From where the run stands to ``train.steps``. With lag 0 this is synchronous.py, number for number."""
    config = run.config
    if run.step == 0:
        evaluate(run)
    ahead: deque[list[Sample]] = deque(run.stored_batches())

    while run.step < config.train.steps:
        while len(ahead) <= config.constant_lag.lag and run.step + len(ahead) < config.train.steps:
            samples = collect(run, run.step + len(ahead))
            run.assign_advantages(samples)
            run.find_old_logprobs([samples])
            ahead.append(samples)

        samples = ahead.popleft()
        with run.phase("train"):
            run.update_policy(samples)
        run.step += 1

        with run.phase("sync"):
            run.sync_weights()
        record_step(run, samples)
        if evaluation_due(run):
            evaluate(run)
        if run.checkpoint_due:
            run.store_batches(ahead)
            run.save_checkpoint(old_logprobs=config.train.old_logprobs)
        run.stop_if_asked()

    evaluate(run)
    run.finish()
