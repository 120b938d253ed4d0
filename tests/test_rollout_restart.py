"""Engines that die, hang or do not come back, under the pool: what is lost (nothing), and what the error says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_engines import FakeEngine, FakeLauncher, request

from megatron_vespo.rollout import EngineDown, EngineError, EnginePool, Patience, ServedWeights, dispatch
from megatron_vespo.rollout import pool as pool_module
from megatron_vespo.rollout.health import sign_of_life

WEIGHTS = ServedWeights(Path("/weights/7"), 7)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PING_EVERY_S", 0.02)
    monkeypatch.setattr(dispatch, "TICK_S", 0.01)


@pytest.fixture
def pools() -> Iterator[list[EnginePool]]:
    made: list[EnginePool] = []
    yield made
    for pool in made:
        pool.shutdown()


def make(
    pools: list[EnginePool], engines: list[FakeEngine], launcher: FakeLauncher | None, **patience: float
) -> EnginePool:
    settings = Patience(restart_delay_s=0.01, hang_timeout_s=0.2, **patience)  # type: ignore[arg-type]
    pools.append(EnginePool(engines, launcher=launcher, weights=WEIGHTS, patience=settings))  # type: ignore[arg-type]
    return pools[-1]


def two(**settings: float) -> list[FakeEngine]:
    return [FakeEngine(f"http://engine-{i}", version=7, **settings) for i in range(2)]


def complete(answers: list[list], tokens: int) -> bool:
    return all(len(g.tokens) == tokens and (g.weight_versions == 7).all() for group in answers for g in group)


def test_a_dead_engine_comes_back_with_the_newest_weights_and_nothing_is_lost(pools: list[EnginePool]) -> None:
    engine, launcher = FakeEngine("http://engine", tokens_per_s=20, version=7), FakeLauncher()
    pool = make(pools, [engine], launcher)
    futures = pool.submit([request(f"g{i}", 10, n=3) for i in range(4)])
    time.sleep(0.05)
    engine.die()
    answers = [future.result(timeout=5) for future in futures]
    assert complete(answers, 10) and all(len(group) == 3 for group in answers)
    assert all(g.retries == ("http://engine is dead",) for group in answers for g in group)
    ((index, weights, revived),) = launcher.launched
    assert (index, weights) == (0, WEIGHTS) and engine.shut_down == 1
    assert [asked.id for asked in revived.asked] == [f"g{i}~2" for i in range(4)]
    assert pool.take_counts() == {"engine_restarts": 1, "requests_retried": 4}
    assert pool.healthy() and pool.engines == (revived,)


def test_the_others_do_its_work_while_it_restarts(pools: list[EnginePool]) -> None:
    engines, launcher = two(tokens_per_s=100), FakeLauncher()
    launcher.seconds = 3.0
    pool = make(pools, engines, launcher)
    futures = pool.submit([request(f"g{i}", 10) for i in range(6)])
    time.sleep(0.03)
    engines[0].die()
    assert complete([future.result(timeout=2) for future in futures], 10)
    assert len(engines[1].asked) == 6


def test_a_hung_engine_is_told_from_a_busy_one_and_its_late_answer_is_not_taken(pools: list[EnginePool]) -> None:
    hung, busy = FakeEngine("http://hung", version=7), FakeEngine("http://busy", tokens_per_s=20, version=7)
    launcher = FakeLauncher()
    hung.hangs = True
    pool = make(pools, [hung, busy], launcher)
    hung_answer, busy_answer = pool.submit([request("a", 20), request("b", 20)])
    assert len(hung_answer.result(timeout=3)[0].tokens) == 20
    hung.hangs = False  # whatever it says now
    assert hung_answer.result()[0].retries[0].startswith("http://hung hangs: no sign of life for 0.2 s")
    assert busy_answer.result(timeout=3)[0].retries == (), "a second without an answer is no hanging"
    assert [index for index, _, _ in launcher.launched] == [0]


def test_an_engine_that_does_not_end_what_is_aborted_hangs(
    pools: list[EnginePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "ABORT_GRACE_S", 0.2)
    engine, launcher = FakeEngine("http://deaf", tokens_per_s=1, version=7), FakeLauncher()
    engine.deaf = True
    pool = make(pools, [engine], launcher, request_timeout_s=0.2)
    ((got,),) = pool.generate([request("a", 50)])
    assert len(got.tokens) == 50 and "did not end within 0.2 s more" in got.retries[0]


def test_an_idle_engine_that_died_is_found_out_by_the_next_call(pools: list[EnginePool]) -> None:
    for call in ("generate", "update", "score", "pause"):
        engines, launcher = two(), FakeLauncher()
        pool = make(pools, engines, launcher)
        engines[1].die()
        if call == "generate":
            assert complete(pool.generate([request(f"g{i}") for i in range(4)]), 10)
        elif call == "update":
            pool.update_weights_from_disk(Path("/weights/8"), 8)
        elif call == "score":
            assert len(pool.score([np.arange(4)])) == 1
        else:
            pool.pause()
            pool.resume()
        deadline = time.monotonic() + 3
        while len(pool.engines) < 2:
            assert time.monotonic() < deadline, call
            time.sleep(0.01)
        assert pool.weight_version() == (8 if call == "update" else 7)


def test_weights_that_come_during_a_restart_are_loaded_before_the_first_request(pools: list[EnginePool]) -> None:
    engines, launcher = two(), FakeLauncher()
    launcher.seconds = 1.5
    pool = make(pools, engines, launcher)
    engines[0].die()
    pool.generate([request("a")])
    assert launcher.began.wait(10)
    pool.update_weights_from_disk(Path("/weights/8"), 8)
    while len(pool.engines) < 2:
        time.sleep(0.01)
    ((_, weights, revived),) = launcher.launched
    assert weights == WEIGHTS and revived.version == 8 and revived.asked == []


def test_an_engine_that_says_another_version_or_fails_the_proof_gets_no_request(pools: list[EnginePool]) -> None:
    for wrong in ("version", "proof"):
        engine, launcher = FakeEngine("http://engine", version=7), FakeLauncher()
        pool = make(pools, [engine], launcher, max_restarts=2)
        if wrong == "version":
            launcher.lies = -1
        else:

            def proof(engine: FakeEngine) -> None:
                raise EngineError(f"{engine.url} computes something else")

            pool.set_proof(proof)  # type: ignore[arg-type]
        engine.die()
        message = "says weight version 6, and was given 7" if wrong == "version" else "computes something else"
        with pytest.raises(EngineError, match=rf"(?s)engine 0 is lost after 2 restarts.*({message}.*){{2}}"):
            pool.generate([request("a")])
        assert [revived.asked for _, _, revived in launcher.launched] == [[], []]


def test_an_engine_that_does_not_come_back_ends_the_run_saying_what_was_tried(pools: list[EnginePool]) -> None:
    engines, launcher = two(tokens_per_s=5), FakeLauncher()
    launcher.fails = lambda attempt: f"no memory, {attempt}"
    pool = make(pools, engines, launcher, max_restarts=3)
    futures = pool.submit([request("a", 100), request("b", 100)])
    time.sleep(0.05)
    engines[1].die()
    pattern = (
        r"(?s)engine 1 is lost after 3 restarts in a row \(rollout.max_restarts\): http://engine-1 is dead\n"
        r"the end of engine-1.log\nrestart 1 of 3: no memory, 1\nrestart 2 of 3: no memory, 2\nrestart 3 .*, 3"
    )
    for future in futures:
        with pytest.raises(EngineError, match=pattern):
            future.result(timeout=3)
    for later in (lambda: pool.generate([request("c")]), pool.pause, pool.weight_version):
        with pytest.raises(EngineError, match="engine 1 is lost"):
            later()


def test_restarts_are_counted_in_a_row(pools: list[EnginePool]) -> None:
    engine, launcher = FakeEngine("http://engine", version=7), FakeLauncher()
    pool = make(pools, [engine], launcher, max_restarts=1)
    for _ in range(3):
        pool.engines[0].die()  # type: ignore[attr-defined]
        assert complete(pool.generate([request("a")]), 10)
    assert len(launcher.launched) == 3


def test_a_request_that_kills_every_engine_ends_the_run_with_its_name(pools: list[EnginePool]) -> None:
    class Fragile(FakeEngine):
        async def answer(self, requests: list) -> list:
            if any(asked.id.startswith("poison") for asked in requests):
                self.die()
            return await super().answer(requests)

    class Launcher(FakeLauncher):
        def relaunch(self, index: int, weights: ServedWeights) -> FakeEngine:
            return Fragile(f"http://again-{index}", version=weights.version)

    pool = make(pools, [Fragile("http://a", version=7), Fragile("http://b", version=7)], Launcher(), request_retries=2)
    with pytest.raises(
        EngineError, match=r"'poison' failed 3 times \(rollout.request_retries = 2\):(\n  .* is dead){3}"
    ):
        pool.generate([request("poison"), request("healthy")])


def test_without_restarts_the_run_ends_at_once(pools: list[EnginePool]) -> None:
    engine, launcher = FakeEngine("http://engine", version=7), FakeLauncher()
    pool = make(pools, [engine], launcher, max_restarts=0)
    engine.die()
    with pytest.raises(EngineError, match=r"^http://engine is dead\nthe end of engine-0.log$"):
        pool.generate([request("a")])
    assert launcher.launched == []


def test_of_engines_that_someone_else_started_the_others_do_the_work(pools: list[EnginePool]) -> None:
    engines = two(tokens_per_s=200)
    pool = make(pools, engines, None)
    futures = pool.submit([request(f"g{i}", 10) for i in range(4)])
    time.sleep(0.02)
    engines[0].die()
    assert complete([future.result(timeout=3) for future in futures], 10)
    assert pool.engines == (engines[1],) and not pool.healthy()

    # It comes back, with whatever weights; it serves again once it has been given the newest.
    engines[0].error, engines[0].version = None, 3
    assert complete(pool.generate([request("while lost")]), 10) and len(pool.engines) == 1
    pool.update_weights_from_disk(Path("/weights/8"), 8)
    assert len(pool.engines) == 2 and pool.weight_version() == 8

    for engine in engines:
        engine.die()
    with pytest.raises(EngineError, match=r"(?s)none of the 2 engines is left, the last: .*started by someone else"):
        pool.generate([request("b")])


def test_weights_that_lie_in_no_folder_are_streamed_to_a_restarted_engine_before_its_first_request(
    pools: list[EnginePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LOOK_EVERY_S", 0.05)
    for waits in ("generate", "score"):
        engine, launcher = FakeEngine("http://engine", version=7), FakeLauncher()
        pool = make(pools, [engine], launcher)
        streamed: list[int] = []

        def stream(pool: EnginePool = pool, streamed: list[int] = streamed) -> None:
            pool.expect(None)
            for engine in (*pool.engines, *pool.stale):
                engine.version = 9  # type: ignore[attr-defined]
                streamed.append(len(engine.asked))  # type: ignore[attr-defined]
            pool.admit(9)

        pool.refresh = stream
        stream()
        engine.die()
        if waits == "generate":
            ((got,),) = pool.generate([request("a")])
            assert (got.weight_versions == 9).all() and len(got.retries) == 1
        else:
            assert pool.score([np.arange(3)])[0][0][0] == 9
        ((_, weights, revived),) = launcher.launched
        assert weights == WEIGHTS and streamed == [0, 0] and pool.engines == (revived,) and pool.stale == ()


def test_a_stale_engine_that_was_not_given_the_newest_weights_stays_away(pools: list[EnginePool]) -> None:
    engines, launcher = two(), FakeLauncher()
    pool = make(pools, engines, launcher)
    pool.expect(None)
    engines[0].die()
    pool.generate([request("a"), request("b")])
    while not pool.stale:
        time.sleep(0.01)
    pool.admit(9)
    pool.generate([request("c"), request("d")])
    assert pool.engines == (engines[1],) and launcher.launched[0][2].asked == []
    pool.admit(7)
    assert len(pool.engines) == 2


def test_a_sign_of_life_is_waited_for_so_long_and_no_longer() -> None:
    engine = FakeEngine("http://engine")
    asyncio.run(sign_of_life(engine, 0.1))
    engine.hangs = True
    started = time.monotonic()
    with pytest.raises(EngineDown, match=r"http://engine hangs: no sign of life for 0.1 s \(rollout.hang_timeout_s\)"):
        asyncio.run(sign_of_life(engine, 0.1))
    assert time.monotonic() - started < 1
    engine.die()
    with pytest.raises(EngineDown, match="is dead"):
        asyncio.run(sign_of_life(engine, 0.1))


def test_a_closed_pool_fails_who_still_waits_and_restarts_nothing(pools: list[EnginePool]) -> None:
    engine, launcher = FakeEngine("http://engine", tokens_per_s=1, version=7), FakeLauncher()
    pool = make(pools, [engine], launcher)
    (future,) = pool.submit([request("a", 100)])
    pool.close()
    with pytest.raises(EngineError, match="has been closed"):
        future.result(timeout=2)
    assert launcher.launched == []
