"""Asynchronous training: engines sample while the trainer trains, and no token is older than it may be."""

from __future__ import annotations

from megatron_vespo.loop.evaluate import evaluate, evaluation_due
from megatron_vespo.loop.record import record_step
from megatron_vespo.loop.rollouts import Rollouts
from megatron_vespo.loop.run import Run
from megatron_vespo.samples.records import Sample


def train(run: Run) -> None:
    """From where the run stands to ``train.steps``.

    With max_staleness = sync_every - 1 and train.mini_batches = sync_every this is synchronous.py, number for number.
    """
    config = run.config
    if run.step == 0:
        evaluate(run)

    with Rollouts(run) as rollouts:
        while run.step < config.train.steps:
            trained: list[Sample] = []
            for _ in range(config.train.mini_batches):
                with run.phase("wait"):
                    mini_batch = rollouts.take()
                run.assign_advantages(mini_batch)
                run.weigh_down_stale(mini_batch)
                run.find_old_logprobs([mini_batch])
                with run.phase("train"):
                    run.update_policy(mini_batch)
                trained += mini_batch
                if run.version - run.served >= config.asynchronous.sync_every:
                    sync(run)
            run.step += 1

            record_step(run, trained, rollouts.metrics())
            if evaluation_due(run):
                sync(run)
                evaluate(run)
            if run.checkpoint_due:
                run.save_checkpoint(rollouts=rollouts.save())
            run.stop_if_asked()

        sync(run)
        evaluate(run)
        run.finish(rollouts=rollouts.save())


def sync(run: Run) -> None:
    """Responses under way go on under the new weights."""
    if run.served < run.version:
        with run.phase("sync"):
            run.sync_weights()
