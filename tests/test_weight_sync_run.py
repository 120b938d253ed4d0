"""Whole runs: a sync that is proven is a metric, one that is not ends the run with the tensor's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from damaged_sync import VICTIM
from tiny_run import make_run, processes_about, records, train, wait_until

from megatron_vespo.cli import main

pytestmark = pytest.mark.slow


def test_syncs_by_broadcast_are_proven_and_measured(tmp_path: Path) -> None:
    config = make_run(tmp_path, train={"steps": 3}, sync={"transport": "broadcast", "delta": True})
    code, out, err = train(config, "optimizer.lr=1e-10", "cluster.ranks_per_node=1")
    assert code == 0, out + err
    steps = [record for record in records(tmp_path / "run") if "eval" not in record]
    assert len(steps) == 3
    for record in steps:
        assert record["sync_tensors_checked"] == record["sync_tensors"] == 69
        assert record["rollout_logprob_diff"] < 1e-5
        assert record["sync_full_bytes"] > 200_000 and record["sync_seconds"] > 0
    assert all(record["sync_probe_max"] < 1e-4 for record in steps[1:])
    shares = [record["sync_bytes"] / record["sync_full_bytes"] for record in steps]
    # At so small a rate only the smallest float32 weights move.
    assert shares[0] == 1.0 and all(0 < share < 0.3 for share in shares[1:])


def test_a_damaged_tensor_ends_the_run_with_its_name_and_nothing_left(tmp_path: Path) -> None:
    config = make_run(
        tmp_path, train={"steps": 5}, sync={"transport": "shared_memory"}, objective={"name": "damaged_sync.vespo"}
    )
    code, _, err = train(config)
    assert code == 1
    assert f"error: weight sync: {VICTIM} was sent with checksum" in err and "Traceback" not in err
    steps = [record for record in records(tmp_path / "run") if "eval" not in record]
    assert len(steps) == 1, "the step whose sync failed must not be recorded as done"
    wait_until(lambda: not processes_about(str(tmp_path)), 20, "all processes ended")


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (["sync.delta=true"], ["sync.delta = true", "sync.transport = disk"]),
        (["sync.transport=shared_memory", "cluster.nodes=2"], ["sync.transport = shared_memory", "cluster.nodes = 2"]),
        (
            ["sync.transport=shared_memory", "rollout.urls=[http://10.0.0.7:30000]"],
            ["sync.transport = shared_memory", "rollout.urls", "http://10.0.0.7:30000"],
        ),
        (["rollout.urls=[http://10.0.0.7:30000]"], ["sync.transport = disk", "rollout.urls", "no sync.folder"]),
    ],
)
def test_transports_that_cannot_reach_the_engines_are_refused(
    overrides: list[str], fields: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    assert main(["train", str(make_run(tmp_path)), *overrides]) == 2
    err = capsys.readouterr().err
    assert all(field in err for field in fields), err
