"""Saves beside the training, and restarts of the trainers: what is kept, removed and raised, and when."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_run import FakeTrainers, fake_run
from test_asynchronous import train as train_asynchronously

from megatron_vespo.cluster.ray_cluster import ClusterError
from megatron_vespo.cluster.trainer_group import RankLost
from megatron_vespo.loop import attempts, synchronous
from megatron_vespo.loop.run import Run
from megatron_vespo.policy.checkpoint_folder import complete, newest, newest_step, read_state
from megatron_vespo.rollout.protocol import EngineError
from megatron_vespo.samples.accounting import account
from megatron_vespo.samples.disk import DiskFull

DEADLINE_S = 60


class SlowWriter(FakeTrainers):
    """``write_snapshot`` goes on when ``may_write`` says so, and fails with ``write_error``."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.writing, self.may_write = threading.Event(), threading.Event()
        self.write_error: Exception | None = None
        self.snapshots: list[str] = []

    def take_snapshot(self, folder: Path) -> None:
        super().take_snapshot(folder)
        self.snapshots.append(folder.name)

    def write_snapshot(self, state: dict[str, Any]) -> None:
        self.writing.set()
        assert self.may_write.wait(DEADLINE_S)
        if self.write_error is not None:
            raise self.write_error
        super().write_snapshot(state)


def a_run(folder: Path, **sections: dict[str, Any]) -> tuple[Run, SlowWriter]:
    run = fake_run(folder, **{"train": {"mode": "synchronous"}, "checkpoint": {"every": 1, "keep": 1}, **sections})
    run.trainers = trainers = SlowWriter()  # type: ignore[assignment]
    run.saves.trainers = trainers  # type: ignore[assignment]
    return run, trainers


def test_training_goes_on_during_a_save_and_the_next_save_waits_for_it(tmp_path: Path) -> None:
    run, trainers = a_run(tmp_path)
    thread = threading.Thread(target=synchronous.train, args=(run,), daemon=True)
    thread.start()
    assert trainers.writing.wait(DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while len(trainers.trained) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    # The second update was made while the first checkpoint was being written; its own save has to wait.
    assert len(trainers.trained) == 2 and trainers.snapshots == ["step_000001"]
    assert complete(tmp_path / "checkpoints") == []
    trainers.may_write.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert list(dict.fromkeys(trainers.snapshots)) == [f"step_{step:06d}" for step in range(1, 7)]
    assert newest_step(tmp_path / "checkpoints") == 6 and len(complete(tmp_path / "checkpoints")) == 1


def test_until_a_save_is_committed_nothing_of_the_one_before_is_removed(tmp_path: Path) -> None:
    run, trainers = a_run(tmp_path)
    trainers.may_write.set()
    run.step = run.version = 1
    run.store_batches([[]])
    run.save_checkpoint()
    run.saves.wait()
    trainers.may_write.clear()
    run.step = run.version = 2
    run.store_batches([[]])
    run.save_checkpoint()
    ahead = sorted(path.name for path in (tmp_path / "ahead").iterdir())
    assert newest_step(tmp_path / "checkpoints") == 1 and ahead == ["step_000001", "step_000002"]
    trainers.may_write.set()
    run.saves.wait()
    assert newest_step(tmp_path / "checkpoints") == 2
    assert [path.name for path in (tmp_path / "ahead").iterdir()] == ["step_000002"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_ends_the_run_and_leaves_no_checkpoint(tmp_path: Path, background: bool) -> None:
    run, trainers = a_run(tmp_path, checkpoint={"every": 1, "background": background})
    trainers.may_write.set()
    trainers.write_error = DiskFull("no room")
    with pytest.raises(DiskFull, match="no room"):
        synchronous.train(run)
    # At once where it is waited for; else before the next update, or at the next save at the latest.
    assert len(trainers.trained) <= (2 if background else 1)
    assert complete(tmp_path / "checkpoints") == [] and account(tmp_path).balances


# ---------------------------------------------------------------------------------------------- restarts


def lost(rank: int) -> RankLost:
    return RankLost(f"trainer rank {rank} failed: it died\n--- end of its log {rank}")


def test_restarts_are_counted_from_checkpoint_to_checkpoint() -> None:
    patience = attempts.Patience(2)
    for step in (0, 0, 5, 5, 7):
        patience.spend(lost(0), step)
    assert patience.spent == 1
    patience.spend(lost(1), 3)  # one that was set aside is no progress
    with pytest.raises(ClusterError, match=r"end of its log 0\n.*first of 3 deaths .* step 7 .*max_restarts = 2"):
        patience.spend(lost(2), 7)


def test_without_restarts_the_first_death_is_the_last() -> None:
    with pytest.raises(RankLost, match="rank 3"):
        attempts.Patience(0).spend(lost(3), 4)


@pytest.mark.parametrize(
    ("errors", "begun", "ends_with"),
    [
        ([lost(0), lost(1)], 3, None),
        ([ClusterError("a bug")], 1, ClusterError),
        ([DiskFull("full")], 1, DiskFull),
        ([EngineError("refused")], 1, EngineError),
        ([lost(0)] * 9, 4, ClusterError),
    ],
)
def test_only_a_dead_rank_begins_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[Exception], begun: int, ends_with: Any
) -> None:
    coming, opened = list(errors), []

    @contextmanager
    def opens(*_: Any) -> Any:
        opened.append(1)
        yield None

    def trains(run: Any) -> None:
        if coming:
            raise coming.pop(0)

    cluster = SimpleNamespace(colocate=False, max_restarts=3)
    sync = SimpleNamespace(transport="disk")
    config = SimpleNamespace(cluster=cluster, sync=sync, directory=tmp_path)
    monkeypatch.setattr(attempts, "open_job", lambda resolved: nullcontext())
    monkeypatch.setattr(attempts, "open_run", opens)
    monkeypatch.setattr(attempts.modes, "train", trains)
    if ends_with is None:
        attempts.train(SimpleNamespace(run=config))  # type: ignore[arg-type]
    else:
        with pytest.raises(ends_with):
            attempts.train(SimpleNamespace(run=config))  # type: ignore[arg-type]
    assert len(opened) == begun


def test_an_asynchronous_run_that_lost_a_rank_goes_on_with_the_same_engines(tmp_path: Path) -> None:
    """Requests under way are given up and asked anew under the same names; no sample is lost or trained twice."""
    first = fake_run(tmp_path, asynchronous={"max_staleness": 3}, checkpoint={"every": 2}, step_s=0.01)
    update = first.trainers.train_mini_batch

    def dies_at_the_fourth(samples: Any) -> Any:
        if len(first.trainers.trained) == 3:  # type: ignore[attr-defined]
            raise lost(1)
        return update(samples)

    first.trainers.train_mini_batch = dies_at_the_fourth  # type: ignore[method-assign]
    with pytest.raises(RankLost):
        train_asynchronously(first)
    first.saves.settle()
    assert any(seat.calls for seat in first.engines.pool._dispatcher.seats), "responses are under way"
    asker = first.engines.pool.asker()
    first.engines.pool.forsake()
    with pytest.raises(EngineError, match="nobody waits for this response any more"):
        asker.generate([])  # an episode that has not noticed
    assert not any(seat.calls for seat in first.engines.pool._dispatcher.seats)
    first.ledger.close()

    checkpoint = newest(tmp_path / "checkpoints")
    assert checkpoint is not None
    second = fake_run(tmp_path, asynchronous={"max_staleness": 3}, resumed=read_state(checkpoint))
    second.engines = first.engines
    second.engine_weights.engine = first.engines.engine  # type: ignore[attr-defined]
    second.sync_weights()  # backwards: the engine has sampled by later weights
    assert first.engines.engine.version == 2  # type: ignore[attr-defined]
    train_asynchronously(second)
    counted = account(tmp_path)
    assert counted.balances and sorted(counted.updates) == list(range(6)) and set(counted.updates.values()) == {8}
