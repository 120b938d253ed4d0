"""``megatron-vespo train`` in asynchronous mode, killed with responses under way: they go on where they were."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny_run import make_run, processes_about, records, start, train, wait_until

from megatron_vespo.cli import main
from megatron_vespo.samples.accounting import account
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.store import batch_file, read_batch, stored_steps

pytestmark = pytest.mark.slow

STEPS, CHECKPOINT = 7, 3


def under_way(run: Path) -> list[Sample]:
    """What a killed run has left of responses under way."""
    with Ledger(run) as ledger:
        groups = ledger.begun([row[0] for row in ledger._db.execute("SELECT name FROM groups WHERE NOT replaced")])
    return [sample for samples in groups.values() for sample in samples if len(sample.response_tokens)]


def test_responses_under_way_at_a_checkpoint_are_continued_after_a_kill_9(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(
        tmp_path,
        data={"evaluate": None},
        train={"mode": "asynchronous", "steps": STEPS, "prompts_per_step": 4, "mini_batches": 1},
        asynchronous={"max_staleness": 2},
        # An engine slower than the trainer, on any machine: then each checkpoint finds responses under way.
        rollout={"max_response_tokens": 160, "engine_args": {"max-running-requests": 2}},
        checkpoint={"every": CHECKPOINT, "export_hf": False},
        cluster={"ranks_per_node": 1},
        log={"rollouts_kept": 100},
    )
    run = tmp_path / "run"
    process = start(config)
    committed = run / "checkpoints" / f"step_{CHECKPOINT:06d}"
    wait_until(lambda: committed.exists() or process.poll() is not None, 300, "the checkpoint")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until(lambda: not processes_about(str(tmp_path)), 120, "all processes ended")
    parts = under_way(run)
    assert parts and account(run).balances

    code, out, err = train(config)
    assert code == 0, out + err
    said = re.search(r"were open at the checkpoint: .* (\d+) go on from what there was", out.replace("\n", " "))
    assert said and int(said[1]) > 0, out

    folder = run / "rollouts"
    trained = {s.id: s for step in stored_steps(folder) for s in read_batch(batch_file(folder, step))}
    older = 0
    for part in parts:
        got, usable = trained[part.id], part.weight_versions <= CHECKPOINT
        count = len(usable) if usable.all() else int(usable.argmin())
        older += int((part.weight_versions[:count] < CHECKPOINT).sum())
        for name in ("response_tokens", "rollout_logprobs", "weight_versions"):
            np.testing.assert_array_equal(getattr(got, name)[:count], getattr(part, name)[:count])
    assert older, "no token by weights that the checkpoint does not have"
    assert any(len(trained[part.id].response_tokens) > len(part.response_tokens) for part in parts)
    for record in [r for r in records(run) if "eval" not in r]:
        # log pi_old of those tokens was computed before their weights were gone.
        assert record["rollout_logprob_diff"] < 1e-5 and record["mismatch/max"] < 1e-4
    assert records(run)[-1]["rollouts/continued"] > 0

    counted = account(run)
    assert counted.balances and sorted(counted.updates) == list(range(STEPS))
    assert main(["ledger", str(run)]) == 0
    assert re.search(r"\d+ went on from the [\d,]+ tokens that there were of them", capsys.readouterr().out)
