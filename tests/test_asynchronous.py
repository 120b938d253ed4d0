"""The asynchronous loop with engines and trainers that only count: what is asked, trained and dropped, and when."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import FakeLauncher
from fake_run import PROMPTS, fake_run

from megatron_vespo.loop import asynchronous
from megatron_vespo.loop.run import Run
from megatron_vespo.observe.records import read_records
from megatron_vespo.policy.checkpoint_folder import read_state
from megatron_vespo.rollout import EngineError, EnginePool
from megatron_vespo.rollout.restart import ServedWeights
from megatron_vespo.samples.accounting import account, account_table
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.store import read_batch

SLOW_ENGINE = {"step_s": 0.002, "update_s": 0.0}
SLOW_TRAINER = {"step_s": 0.001, "update_s": 0.02}
STRAGGLERS = tuple(60 if i % 7 == 0 else 3 for i in range(PROMPTS))


def train(run: Run) -> None:
    """A run that never ends fails its test, and only that."""
    ended: Future[None] = Future()

    def body() -> None:
        try:
            ended.set_result(asynchronous.train(run))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    ended.result(timeout=60)


def trained(run: Run) -> list[list[Sample]]:
    return run.trainers.trained  # type: ignore[attr-defined]


def versions_of(samples: Iterable[Sample]) -> set[int]:
    return {int(version) for sample in samples for version in sample.weight_versions}


def lags(batches: list[list[Sample]]) -> np.ndarray:
    """[samples]: of the oldest token of each."""
    return np.array([version - s.weight_versions.min() for version, batch in enumerate(batches) for s in batch])


def steps(run: Run) -> list[dict[str, Any]]:
    return [record for record in read_records(run.config.directory / "metrics.jsonl") if "eval" not in record]


def accounts_balance(run: Run) -> dict[str, float]:
    last = {name: value for name, value in steps(run)[-1].items() if name.startswith("rollouts/")}
    dropped = sum(value for name, value in last.items() if name.startswith("rollouts/dropped_"))
    assert last["rollouts/asked"] == last["rollouts/trained"] + dropped + last["rollouts/open"]
    return last


@pytest.mark.parametrize("pace", [SLOW_ENGINE, SLOW_TRAINER], ids=["slow-engine", "slow-trainer"])
@pytest.mark.parametrize("too_stale", ["wait", "drop"])
@pytest.mark.parametrize("bound,every", [(0, 1), (2, 1), (3, 4)])
def test_no_trained_token_is_older_than_the_bound(
    tmp_path: Path, pace: dict[str, float], too_stale: str, bound: int, every: int
) -> None:
    run = fake_run(
        tmp_path,
        lengths=STRAGGLERS,
        asynchronous={"max_staleness": bound, "sync_every": every, "too_stale": too_stale},
        train={"mini_batches": 2},
        **pace,
    )
    train(run)
    assert run.version == 12 and [len(batch) for batch in trained(run)] == [4] * 12
    assert lags(trained(run)).max() <= bound
    # Every prompt group is trained once, whole, and none of two.
    names = Counter(s.id.rpartition("/")[0] for batch in trained(run) for s in batch)
    assert set(names.values()) == {2} and len(names) == 24
    last = accounts_balance(run)
    assert last["rollouts/open"] == 0 and last["rollouts/trained"] == 24
    assert all(record["queue/open_max"] <= 2 * (bound + 1) for record in steps(run))
    if too_stale == "wait":
        assert [s.id for batch in trained(run) for s in batch[::2]] == [
            f"{i // 4}/train/{s.prompt.id}/0" for i, s in enumerate(s for batch in trained(run) for s in batch[::2])
        ]
        assert last["rollouts/asked"] == 24
    # A sync that came later than it should would leave the engines' version behind.
    versions = run.engine_weights.versions  # type: ignore[attr-defined]
    assert versions == list(range(every, 13, every))


def test_waiting_trains_in_the_order_asked_and_dropping_in_the_order_done(tmp_path: Path) -> None:
    orders = {}
    for too_stale in ("wait", "drop"):
        run = fake_run(
            tmp_path / too_stale,
            lengths=STRAGGLERS,
            asynchronous={"max_staleness": 1, "too_stale": too_stale},
        )
        train(run)
        orders[too_stale] = run, [s.prompt.id for batch in trained(run) for s in batch[::2]]
    stream = [p.id for p in fake_run(tmp_path / "other").prompts.next(PROMPTS)]
    run, order = orders["wait"]
    assert order == stream[:24] and accounts_balance(run)["rollouts/asked"] == 24
    run, order = orders["drop"]
    last = accounts_balance(run)
    assert last["rollouts/dropped_stale"] > 0 and last["rollouts/asked"] == 24 + last["rollouts/dropped_stale"]
    # Those dropped are the slow ones, of which none could be sampled within two updates of fast ones.
    slow = {p for p in stream if int(p) % 7 == 0}
    assert set(order) & slow == set() or len(set(order) & slow) < len(slow & set(stream[:24]))


def test_what_will_be_dropped_is_not_sampled_to_its_end(tmp_path: Path) -> None:
    lengths = tuple(64 if i % 7 == 0 else 2 for i in range(PROMPTS))
    run = fake_run(tmp_path, lengths=lengths, step_s=0.01, asynchronous={"max_staleness": 1, "too_stale": "drop"})
    train(run)
    names = {s.id.rpartition("/")[0] for batch in trained(run) for s in batch}
    dropped = {name: how for name, how in run.engines.engine.ended.items() if name not in names}  # type: ignore[attr-defined]
    assert accounts_balance(run)["rollouts/dropped_stale"] == len(dropped) > 0
    assert set(dropped.values()) == {"abort"}


def test_down_weighting_trains_late_responses_by_less(tmp_path: Path) -> None:
    settings = {"max_staleness": 1, "too_stale": "down_weight", "stale_weight": 0.5}
    options: dict[str, Any] = {"asynchronous": settings, "train": {"old_logprobs": "engine"}}
    run = fake_run(tmp_path, lengths=STRAGGLERS, step_s=0.004, **options)
    train(run)
    found = lags(trained(run))
    samples = [s for batch in trained(run) for s in batch]
    assert found.max() > 1 and accounts_balance(run)["rollouts/asked"] == 24
    for lag, sample in zip(found, samples, strict=True):
        weight = 0.5 ** max(0, lag - 1)
        assert sample.metadata.get("staleness_weight", 1.0) == weight
        # Two responses of rewards 0 and 1, and their standard deviation.
        assert abs(sample.advantage) == pytest.approx(weight * 0.5 / (np.sqrt(0.5) + 1e-6), rel=1e-4)
    recorded = sum(record["down_weighted"] * 8 for record in steps(run))
    assert recorded == pytest.approx((found > 1).sum())


def test_the_queue_is_no_longer_than_it_may_be(tmp_path: Path) -> None:
    run = fake_run(tmp_path, asynchronous={"max_staleness": 5, "max_open": 6}, **SLOW_TRAINER)
    train(run)
    assert max(record["queue/open_max"] for record in steps(run)) == 6
    assert max(record["queue/ready"] for record in steps(run)) <= 6
    assert lags(trained(run)).max() <= 2, "six groups are an update and a half ahead"


def test_responses_go_on_over_a_sync_and_each_token_keeps_its_version(tmp_path: Path) -> None:
    order = [int(p.id) for p in fake_run(tmp_path / "order").prompts.next(PROMPTS)]
    lengths = tuple(4 + order.index(i) for i in range(PROMPTS))  # the first are done, and trained, before the others
    run = fake_run(tmp_path, lengths=lengths, step_s=0.005, asynchronous={"max_staleness": 3})
    train(run)
    samples = [s for batch in trained(run) for s in batch]
    mixed = [s for s in samples if len(set(s.weight_versions)) > 1]
    assert mixed and all((np.diff(s.weight_versions) >= 0).all() for s in samples)
    # Each token's log pi_old is of its own version: the fake trainer says minus the version, or -1 for the current one.
    for version, batch in enumerate(trained(run)):
        for s in batch:
            expected = np.where(s.weight_versions == version, -1.0, -s.weight_versions.astype(np.float64))
            np.testing.assert_array_equal(s.old_logprobs, expected)
    histogram = Counter({int(k): n for record in steps(run) for k, n in record["staleness_tokens"].items()})
    counted = Counter(
        int(lag) for version, batch in enumerate(trained(run)) for s in batch for lag in version - s.weight_versions
    )
    assert sum(counted.values()) == sum(n for r in steps(run) for n in r["staleness_tokens"].values())
    assert set(histogram) == set(counted)


def test_groups_without_spread_are_replaced(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rollout={"dynamic_sampling": True}, asynchronous={"max_staleness": 1})
    run.rewards.flat = {str(i) for i in range(0, PROMPTS, 3)}  # type: ignore[attr-defined]
    train(run)
    assert all(int(s.prompt.id) % 3 for batch in trained(run) for s in batch)
    last = accounts_balance(run)
    assert last["rollouts/dropped_without_spread"] > 5 and last["rollouts/trained"] == 24


def test_groups_without_spread_serve_where_there_are_no_others(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rollout={"dynamic_sampling": True, "max_rounds": 2}, train={"steps": 2})
    run.rewards.flat = {str(i) for i in range(PROMPTS)}  # type: ignore[attr-defined]
    train(run)
    assert len(trained(run)) == 2 and accounts_balance(run)["rollouts/dropped_without_spread"] <= 2 * 2 * 4


@pytest.mark.parametrize("side", ["engine", "reward", "trainer"])
def test_an_error_on_either_side_ends_the_run_with_itself(tmp_path: Path, side: str) -> None:
    run = fake_run(tmp_path, asynchronous={"max_staleness": 2})
    error = {"engine": EngineError("it refuses"), "reward": RuntimeError("no worker"), "trainer": ValueError("no room")}
    run.trainers.seconds = 0.01  # type: ignore[attr-defined]
    original = run.trainers.train_mini_batch

    def later(samples: list[Sample]) -> Any:
        if run.version == 2:
            part = {"engine": run.engines.engine, "reward": run.rewards, "trainer": run.trainers}[side]  # type: ignore[attr-defined]
            part.error = error[side]
        return original(samples)

    run.trainers.train_mini_batch = later  # type: ignore[method-assign]
    with pytest.raises(type(error[side]), match=str(error[side])):
        train(run)
    assert 2 <= run.version <= 5


def train_until(run: Run, version: int) -> None:
    """Interrupted where it would make the update from ``version``."""
    original = run.trainers.train_mini_batch

    def interrupted(samples: list[Sample]) -> Any:
        if run.version == version:
            raise KeyboardInterrupt
        return original(samples)

    run.trainers.train_mini_batch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(run)
    run.saves.settle()
    run.engines.pool.forsake()
    run.ledger.close()


def assert_old_logprobs(run: Run, first: int, exact: bool) -> None:
    """What the fake trainer says of each token: minus its version, or -1 for the current one. No weights are asked for
    that were gone when the run began."""
    for version, batch in enumerate(trained(run), start=first):
        for s in batch:
            expected = np.where(s.weight_versions == version, -1.0, -s.weight_versions.astype(np.float64))
            np.testing.assert_array_equal(s.old_logprobs, expected if exact else s.rollout_logprobs)
    assert all(version is None or version >= first for version, _ in run.trainers.old_passes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("old_logprobs", ["exact", "engine"])
def test_a_resumed_run_trains_each_response_once_and_says_what_it_drops(tmp_path: Path, old_logprobs: str) -> None:
    settings = {"max_staleness": 3, "sync_every": 2}
    longer = {"steps": 9, "old_logprobs": old_logprobs}
    run = fake_run(tmp_path, asynchronous=settings, checkpoint={"every": 3}, train=longer, **SLOW_TRAINER)
    train_until(run, 5)
    state = read_state(tmp_path / "checkpoints" / "step_000003")
    assert state["step"] == 3 and state["rollouts"]["open"] > 4

    on_disk = [s for path in (tmp_path / "pending").iterdir() for s in read_batch(path)]
    assert 4 in versions_of(on_disk), "the crash takes with it weights that had sampled"

    resumed = fake_run(tmp_path, asynchronous=settings, train=longer, resumed=state)
    train(resumed)
    resumed.ledger.close()
    both = trained(run)[:3] + trained(resumed)
    names = Counter(s.id for batch in both for s in batch)
    assert len(names) == 9 * 4 * 2 and set(names.values()) == {1}, "each once, none left out"
    assert 4 not in versions_of(s for batch in trained(resumed) for s in batch)
    assert_old_logprobs(resumed, 3, old_logprobs == "exact")
    last = accounts_balance(resumed)
    assert last["rollouts/trained"] == 36 and last["rollouts/open"] == 0
    # By version 2 at most, as the sync after it was the last before the checkpoint at 3.
    opened, again = state["rollouts"]["open"], last["rollouts/sampled_again"]
    said = resumed.progress.console.file.getvalue()  # type: ignore[attr-defined]
    found = re.search(
        rf"{opened} prompt groups were open at the checkpoint: (\d+) are trained from disk, (\d+) go", said
    )
    assert found and int(found[1]) > 0 and int(found[1]) + int(found[2]) + again == opened
    accounts = account(tmp_path)
    assert accounts.balances


@pytest.mark.parametrize("old_logprobs", ["exact", "engine"])
@pytest.mark.parametrize("too_stale", ["wait", "drop"])
def test_responses_under_way_at_a_checkpoint_go_on_after_a_restart(
    tmp_path: Path, old_logprobs: str, too_stale: str
) -> None:
    order = [int(p.id) for p in fake_run(tmp_path / "order").prompts.next(PROMPTS)]
    lengths = tuple(12 + 2 * order.index(i) for i in range(PROMPTS))
    settings = {"max_staleness": 3, "too_stale": too_stale}
    options: dict[str, Any] = {"lengths": lengths, "step_s": 0.004, "asynchronous": settings}
    options["train"] = {"old_logprobs": old_logprobs}
    run = fake_run(tmp_path, checkpoint={"every": 3}, **options)
    kept: list[Sample] = []
    store = run.ledger.generating

    def generating(samples: list[Sample]) -> None:
        kept.extend(samples)
        store(samples)

    publish, engine = run.engine_weights.publish, run.engines.engine  # type: ignore[attr-defined]

    def publish_and_sample(version: int) -> Any:
        report = publish(version)
        deadline = time.monotonic() + 30  # however slow the machine is, what is under way has tokens by the new weights
        while engine.sampled[version] < len(engine.running) and time.monotonic() < deadline:
            time.sleep(0.001)
        return report

    run.engine_weights.publish = publish_and_sample  # type: ignore[method-assign]
    run.ledger.generating = generating  # type: ignore[method-assign]
    train_until(run, 5)  # in the meantime some of them have come to their end, by weights that are lost
    assert any(s.finish_reason == "abort" for s in kept)
    assert {v for s in kept for v in s.weight_versions} >= {2, 3}

    state = read_state(tmp_path / "checkpoints" / "step_000003")
    resumed = fake_run(tmp_path, resumed=state, **options)
    resumed.engines.engine.logprob = -2.0  # type: ignore[attr-defined]
    train(resumed)
    trained_now = {s.id: s for batch in trained(resumed) for s in batch}
    went_on = [s for s in kept if s.id in trained_now]
    assert len(went_on) > 4
    for part in went_on:
        whole, count = trained_now[part.id], len(part.response_tokens)
        for name in ("response_tokens", "rollout_logprobs", "weight_versions"):
            np.testing.assert_array_equal(getattr(whole, name)[:count], getattr(part, name))
        assert whole.response_tokens.tolist() == list(range(lengths[int(part.prompt.id)]))
    for s in trained_now.values():
        assert (s.rollout_logprobs[s.weight_versions > 3] == -2.0).all(), "sampled by weights that are lost"
    assert_old_logprobs(resumed, 3, old_logprobs == "exact")
    of_both = [s.id for s in trained_now.values() if set(s.rollout_logprobs) == {-1.0, -2.0}]
    assert 4 < len(of_both) <= accounts_balance(resumed)["rollouts/continued"] * 2
    counted = account(tmp_path)
    assert counted.balances and counted.rollbacks[-1][5] >= len(of_both)
    assert "went on from the" in account_table(counted)


def test_killed_again_before_the_next_checkpoint_a_run_goes_on_from_the_same_one(tmp_path: Path) -> None:
    order = [int(p.id) for p in fake_run(tmp_path / "order").prompts.next(PROMPTS)]
    lengths = tuple(12 + 2 * order.index(i) for i in range(PROMPTS))
    options: dict[str, Any] = {"lengths": lengths, "step_s": 0.004, "asynchronous": {"max_staleness": 3}}
    first = fake_run(tmp_path, checkpoint={"every": 3}, **options)
    train_until(first, 5)
    state = read_state(tmp_path / "checkpoints" / "step_000003")
    train_until(fake_run(tmp_path, resumed=state, **options), 4)
    last = fake_run(tmp_path, resumed=state, **options)
    train(last)
    names = Counter(s.id for batch in trained(first)[:3] + trained(last) for s in batch)
    assert len(names) == 6 * 4 * 2 and set(names.values()) == {1}
    for s in (s for batch in trained(last) for s in batch):
        assert s.response_tokens.tolist() == list(range(lengths[int(s.prompt.id)]))
    assert_old_logprobs(last, 3, exact=True)
    counted = account(tmp_path)
    assert counted.balances and all(rollback[5] > 0 for rollback in counted.rollbacks)


def test_an_engine_that_comes_back_without_weights_gets_them_from_the_thread_that_trains(tmp_path: Path) -> None:
    run = fake_run(tmp_path, asynchronous={"max_staleness": 1}, step_s=0.002)
    first = run.engines.engine  # type: ignore[attr-defined]
    pool = EnginePool([first], launcher=FakeLauncher(), weights=ServedWeights(tmp_path, 0))
    pool.expect(None)  # weights lie in no folder
    run.engines.pool = pool
    threads: dict[str, set[int]] = {"refresh": set(), "train": set()}
    original = run.trainers.train_mini_batch

    def refresh() -> None:
        threads["refresh"].add(threading.get_ident())
        for engine in pool.stale:
            engine.version = run.engine_weights.served = run.version  # type: ignore[attr-defined]
        pool.admit(run.version)

    def dies_at_2(samples: list[Sample]) -> Any:
        threads["train"].add(threading.get_ident())
        if run.version == 2:
            first.die()
        return original(samples)

    pool.refresh = refresh
    run.trainers.train_mini_batch = dies_at_2  # type: ignore[method-assign]
    publish = run.engine_weights.publish

    def to_all(version: int) -> Any:
        for engine in pool.engines:
            engine.version = version  # type: ignore[attr-defined]
        return publish(version)

    run.engine_weights.publish = to_all  # type: ignore[method-assign]
    train(run)
    assert threads["refresh"] == threads["train"] and len(threads["train"]) == 1
    assert lags(trained(run)).max() <= 1 and accounts_balance(run)["rollouts/trained"] == 24
    assert sum(record.get("engine_restarts", 0) for record in steps(run)) == 1
