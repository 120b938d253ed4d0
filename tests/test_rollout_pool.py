"""The pool over engines that only count: who gets what, what is cut and continued, what a caller can rely on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
from fake_engines import FakeEngine, request

from megatron_vespo.rollout import (
    EngineError,
    EnginePool,
    GenerateRequest,
    Generation,
    Patience,
    SamplingParams,
    dispatch,
)
from megatron_vespo.rollout.jobs import Job


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


def make(pools: list[EnginePool], *engines: FakeEngine, **patience: float) -> EnginePool:
    pools.append(EnginePool(engines, patience=Patience(**patience)))  # type: ignore[arg-type]
    return pools[-1]


def three(**settings: float) -> list[FakeEngine]:
    return [FakeEngine(f"http://engine-{i}", **settings) for i in range(3)]


def test_work_is_spread_by_tokens_and_answers_keep_their_order(pools: list[EnginePool]) -> None:
    engines = three()
    pool = make(pools, *engines)
    costs = [900, 100, 100, 100, 100, 500]
    answers = pool.generate([request(str(i), cost) for i, cost in enumerate(costs)])
    assert [len(group[0].tokens) for group in answers] == costs
    loads = [sum(asked.sampling.max_tokens for asked in engine.asked) for engine in engines]
    assert sorted(loads) == [200, 700, 900]
    assert [load.tokens for load in pool._dispatcher.balance.loads] == [0, 0, 0]


def test_a_single_engine_gets_everything_at_once_in_the_same_calls(pools: list[EnginePool]) -> None:
    engine = FakeEngine("http://engine", tokens_per_s=1e6)
    pool = make(pools, engine, in_flight=4)
    requests = [request(str(i), 6000, n=2) for i in range(12)]
    pool.generate(requests)
    # 65,536 response tokens to a call: five groups of 12,000.
    assert engine.calls == [[str(i) for i in range(start, min(start + 5, 12))] for start in (0, 5, 10)]


def test_a_slow_engine_holds_up_its_own_share_only(pools: list[EnginePool]) -> None:
    fast, slow = FakeEngine("http://fast", tokens_per_s=1000), FakeEngine("http://slow", tokens_per_s=50)
    pool = make(pools, fast, slow, in_flight=4)
    started = time.monotonic()
    pool.generate([request(str(i), 20, n=2) for i in range(40)])
    # Halves would take 20 groups, 2 at once, 0.4 s each: 4 s. The slow one takes what it can in the fast one's time.
    assert len(slow.asked) <= 8 and len(fast.asked) >= 32
    assert time.monotonic() - started < 1.5


def test_never_more_in_flight_than_asked_for(pools: list[EnginePool]) -> None:
    engines = three(tokens_per_s=500)
    pool = make(pools, *engines, in_flight=4)
    futures = pool.submit([request(str(i), 10, n=2) for i in range(30)])
    most = 0
    while not all(future.done() for future in futures):
        most = max(most, *(load.responses for load in pool._dispatcher.balance.loads))
        time.sleep(0.002)
    assert most == 4
    # A group larger than the bound goes to an idle engine, rather than nowhere.
    assert len(pool.generate([request("large", 10, n=9)])[0]) == 9


def test_groups_are_there_as_they_finish(pools: list[EnginePool]) -> None:
    pool = make(pools, *three(tokens_per_s=200))
    short, long = pool.submit([request("short", 4), request("long", 100)])
    wait([short])
    assert not long.done() and len(short.result()[0].tokens) == 4
    assert len(long.result(timeout=5)[0].tokens) == 100


def test_a_refused_request_fails_the_call_by_name_and_nothing_goes_on(pools: list[EnginePool]) -> None:
    engines = [FakeEngine("http://engine-0", tokens_per_s=10), FakeEngine("http://engine-1")]
    pool = make(pools, *engines)
    engines[1].error = EngineError("http://engine-1 refused 'b'")
    with pytest.raises(EngineError, match="engine-1 refused 'b'"):
        pool.generate([request("a", 1000), request("b", 10)])
    deadline = time.monotonic() + 5
    while any(load.tokens for load in pool._dispatcher.balance.loads):
        assert time.monotonic() < deadline, "the other request was not aborted"
        time.sleep(0.01)
    assert engines[0].aborted == {"a"}
    engines[1].error = None
    assert len(pool.generate([request("c", 4)])[0][0].tokens) == 4


def test_a_running_id_is_refused(pools: list[EnginePool]) -> None:
    pool = make(pools, FakeEngine("http://engine", tokens_per_s=100))
    (first,) = pool.submit([request("a", 20)])
    with pytest.raises(ValueError, match="'a' is that of a running request"):
        pool.submit([request("a", 20)])
    assert len(first.result(timeout=5)) == 1


def test_an_update_reaches_every_engine_and_a_stray_version_is_reported(pools: list[EnginePool]) -> None:
    engines = three()
    pool = make(pools, *engines)
    pool.update_weights_from_disk(Path("/weights"), 4)
    assert [engine.version for engine in engines] == [4, 4, 4] and pool.weight_version() == 4
    assert [scores[0][0] for scores in pool.score([np.arange(3)])] == [4, 4, 4]
    engines[2].version = 3
    with pytest.raises(EngineError, match=r"engine-2': 3"):
        pool.weight_version()


def test_a_paused_pool_sends_nothing_and_its_clocks_stand_still(pools: list[EnginePool]) -> None:
    engine = FakeEngine("http://engine", tokens_per_s=100)
    pool = make(pools, engine, request_timeout_s=0.3)
    (running,) = pool.submit([request("running", 20)])
    pool.pause()
    (later,) = pool.submit([request("later", 4)])
    time.sleep(0.4)
    assert engine.paused == "retract" and [asked.id for asked in engine.asked] == ["running"]
    pool.resume()
    assert running.result(timeout=5)[0].retries == () and len(later.result(timeout=5)[0].tokens) == 4


def test_abort_ends_a_group_wherever_it_is(pools: list[EnginePool]) -> None:
    engines = [FakeEngine(f"http://engine-{i}", tokens_per_s=100) for i in range(2)]
    pool = make(pools, *engines, in_flight=2)
    names = ("running", "other", "waiting", "waiting too")
    futures = dict(zip(names, pool.submit([request(name, 100, n=2) for name in names]), strict=True))
    time.sleep(0.1)
    for name in ("running", "waiting"):
        pool.abort(name)
    for name, least, most in (("running", 1, 90), ("waiting", 0, 0)):
        group = futures[name].result(timeout=2)
        assert [g.finish_reason for g in group] == ["abort"] * 2, name
        assert all(least <= len(g.tokens) <= most and len(g.logprobs) == len(g.tokens) for g in group), name
    assert not futures["other"].done() and not futures["waiting too"].done()
    pool.abort()
    assert {g.finish_reason for name in ("other", "waiting too") for g in futures[name].result(timeout=2)} == {"abort"}


def test_a_request_that_takes_too_long_goes_on_elsewhere_from_what_it_has(pools: list[EnginePool]) -> None:
    slow, fast = FakeEngine("http://slow", tokens_per_s=50, version=1), FakeEngine("http://fast", 1e5, version=2)
    pool = make(pools, slow, fast, request_timeout_s=0.4, in_flight=4)
    ((first, second),) = pool.generate([request("long", 100, n=2, prompt=5, seed=7)])
    for got in (first, second):
        assert got.tokens.tolist() == list(range(5, 105)) and got.finish_reason == "length"
        assert got.logprobs.tolist() == [-place for place in range(5, 105)]
        begun = int((got.weight_versions == 1).sum())
        assert 10 <= begun <= 40 and got.weight_versions.tolist() == [1] * begun + [2] * (100 - begun)
        assert len(got.retries) == 1 and "http://slow: not done within 0.4 s" in got.retries[0]
    assert [(r.id, r.n, r.seed, r.sampling.max_tokens + len(r.prompt_tokens)) for r in fast.asked] == [
        ("long~2", 1, 7, 105),
        ("long~3", 1, 8, 105),
    ]
    assert pool.take_counts() == {"requests_retried": 2} and pool.take_counts() == {}


def test_a_request_that_always_takes_too_long_ends_with_every_reason(pools: list[EnginePool]) -> None:
    pool = make(pools, FakeEngine("http://slow", tokens_per_s=10), request_timeout_s=0.1, request_retries=2)
    with pytest.raises(
        EngineError, match=r"'long' failed 3 times \(rollout.request_retries = 2\):(\n  .*not done within.*){3}"
    ):
        pool.generate([request("long", 100)])


def test_what_is_aborted_while_it_is_being_cut_is_not_continued(pools: list[EnginePool]) -> None:
    engine = FakeEngine("http://slow", tokens_per_s=50)
    pool = make(pools, engine, request_timeout_s=0.1)
    engine.deaf = True
    (future,) = pool.submit([request("a", 1000)])
    while "a" not in engine.aborted:
        time.sleep(0.01)
    pool.abort("a")
    engine.deaf = False
    assert future.result(timeout=2)[0].finish_reason == "abort" and len(engine.asked) == 1


def test_what_there_is_is_told_and_goes_on_as_if_nobody_had_asked(pools: list[EnginePool]) -> None:
    engines = [FakeEngine(f"http://engine-{i}", tokens_per_s=100, version=1) for i in range(2)]
    pool = make(pools, *engines, in_flight=2, request_retries=0)
    names = ("running", "other", "waiting")
    futures = pool.submit([request(name, 60, n=2, prompt=5, seed=7) for name in names])
    time.sleep(0.2)
    parts = pool.partials()
    assert set(parts) == set(names) and parts["waiting"] == [None, None]
    for name in names[:2]:
        for part in parts[name]:
            assert part is not None and part.finish_reason == "abort" and 5 <= len(part.tokens) <= 50
            assert part.tokens.tolist() == list(range(5, 5 + len(part.tokens)))
    for engine in engines:
        engine.version = 2
    again = pool.partials()
    for future, name in zip(futures, names, strict=True):
        for got, first, second in zip(future.result(timeout=5), parts[name], again[name], strict=True):
            assert got.tokens.tolist() == list(range(5, 65)) and got.logprobs.tolist() == [-p for p in range(5, 65)]
            assert got.finish_reason == "length" and got.retries == ()
            begun = 0 if first is None else len(first.tokens)
            assert got.weight_versions.tolist() == [1] * begun + [2] * (60 - begun)
            assert second is None or got.tokens[: len(second.tokens)].tolist() == second.tokens.tolist()
    # No retry, though none is allowed; and nobody is asked for what it has given back.
    assert pool.take_counts() == {}
    later = [asked for engine in engines for asked in engine.asked if asked.id == "running~2"]
    assert [(r.n, r.seed) for r in later] == [(1, 7)] and len(later[0].prompt_tokens) + later[
        0
    ].sampling.max_tokens == 65


def test_what_had_a_call_of_its_own_has_one_again(pools: list[EnginePool]) -> None:
    """One call for all would give back the short ones with the longest."""
    engine = FakeEngine("http://engine", tokens_per_s=100)
    pool = make(pools, engine)
    (short,) = pool.submit([request("short", 30, n=2)])
    pool.submit([request("long", 500), request("too", 500)])
    time.sleep(0.1)
    pool.partials()
    assert short.result(timeout=1)[0].finish_reason == "length"
    assert sorted(engine.calls[2:]) == [["long~2", "too~2"], ["short~2", "short~3"]]


def test_what_another_pool_has_of_a_request_is_not_sampled_again(pools: list[EnginePool]) -> None:
    first = make(pools, FakeEngine("http://first", tokens_per_s=100, version=1))
    first.submit([request("a", 40, n=3, prompt=5, seed=7)])
    time.sleep(0.1)
    (part, whole, _) = first.partials()["a"]
    assert part is not None and whole is not None
    whole.finish_reason = "stop"
    engine = FakeEngine("http://second", version=2)
    second = make(pools, engine)
    new, done = second.submit([request("a", 40, n=3, prompt=5, seed=7), request("b")], [[part, whole, None], None])
    begun, ended, fresh = new.result(timeout=5)
    assert begun.tokens.tolist() == fresh.tokens.tolist() == list(range(5, 45))
    assert begun.weight_versions.tolist() == [1] * len(part.tokens) + [2] * (40 - len(part.tokens))
    assert ended is whole and fresh.weight_versions.tolist() == [2] * 40
    assert [(r.id, r.n, r.seed, len(r.prompt_tokens)) for r in engine.asked if r.id != "b"] == [
        ("a", 1, 7, 5 + len(part.tokens)),
        ("a~2", 1, 9, 5),
    ]
    assert len(done.result(timeout=5)[0].tokens) == 10
    # One of which all is there is not asked for at all, and its name may be used again.
    for _ in range(2):
        (again,) = second.submit([request("c", 40)], [[whole]])
        assert again.result(timeout=5) == [whole] and engine.asked[-1].id == "b"


def test_an_engine_that_gives_nothing_back_is_waited_for_no_longer_than_it_may(
    pools: list[EnginePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "SURRENDER_S", 0.3)
    deaf, quick = FakeEngine("http://deaf", tokens_per_s=50), FakeEngine("http://quick", tokens_per_s=50)
    pool = make(pools, deaf, quick)
    deaf.deaf = True
    futures = pool.submit([request("a", 60), request("b", 60)])
    time.sleep(0.2)
    started = time.monotonic()
    parts = pool.partials()
    assert time.monotonic() - started < 1
    assert sorted(part is not None for (part,) in parts.values()) == [False, True]
    deaf.deaf = False  # it comes after all
    for future in futures:
        assert len(future.result(timeout=5)[0].tokens) == 60 and future.result()[0].finish_reason == "length"
    assert pool.take_counts() == {} and pool.healthy()


def test_a_call_that_had_not_reached_its_engine_is_cut_too(pools: list[EnginePool]) -> None:
    engine = FakeEngine("http://engine", tokens_per_s=100)
    pool = make(pools, engine)
    (future,) = pool.submit([request("a", 1000)])
    deafness = threading.Timer(0.3, lambda: setattr(engine, "deaf", False))
    engine.deaf = True
    forgetful = engine.abort

    def abort(request_id: str | None = None) -> None:
        if not engine.deaf:
            forgetful(request_id)

    engine.abort = abort  # type: ignore[method-assign]
    deafness.start()
    (part,) = pool.partials()["a"]
    assert part is not None and not future.done()


@pytest.mark.parametrize(("last", "reason"), [(7, "stop"), (999, "length")])
def test_a_response_cut_in_the_step_of_its_last_token_is_whole(last: int, reason: str) -> None:
    """SGLang looks at what was aborted before it looks at what was sampled."""
    asked = GenerateRequest("a", np.arange(3, dtype=np.int32), SamplingParams(max_tokens=2, stop_token_ids=(7,)))
    job = Job(asked)
    (piece,) = job.pieces()
    tokens = np.array([5, last], np.int32)[: 1 if last == 7 else 2]
    tokens[-1] = last
    cut = Generation(tokens, np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32), "abort")
    assert job.add(piece, [cut], cut=True) == []
    assert job.done.result()[0].finish_reason == reason


def test_many_threads_may_ask_at_once(pools: list[EnginePool]) -> None:
    pool = make(pools, *three(tokens_per_s=2000), in_flight=4)
    lengths: list[int] = []
    threads = [
        threading.Thread(
            target=lambda i=i: lengths.extend(
                len(group[0].tokens) for group in pool.generate([request(f"{i}/{j}", i + 1) for j in range(20)])
            )
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(lengths) == sorted([i + 1 for i in range(8)] * 20)
