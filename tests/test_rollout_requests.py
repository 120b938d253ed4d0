"""Pauses, cuts and continuations, and the convention of log-probs, of every engine alike; against float64."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_checkpoints import load_plain, plain_logprobs
from served_engines import PROMPT, TOLERANCE, Served, ask, assert_own_logprobs, assert_span

from megatron_vespo.rollout import EngineDown, EnginePool, io_loop
from megatron_vespo.rollout.continuation import continuation, joined
from megatron_vespo.rollout.health import sign_of_life

pytestmark = pytest.mark.slow


def test_logprobs_are_of_the_tempered_distribution_whatever_top_k_and_top_p_cut(served: Served) -> None:
    served.load(0)
    model = load_plain(served.folders[0]).double()
    controls = [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5}]
    answers = served.engine.generate([ask(f"c{i}", 40, n=2, temperature=0.7, **c) for i, c in enumerate(controls)])
    for control, group in zip(controls, answers, strict=True):
        for got in group:
            tokens = torch.tensor(np.concatenate([PROMPT, got.tokens]), dtype=torch.long)
            with torch.no_grad():
                logprobs = (model(tokens[None]).logits[0, len(PROMPT) - 1 : -1] / 0.7).log_softmax(-1)
            chosen = logprobs.gather(-1, tokens[len(PROMPT) :, None])
            np.testing.assert_allclose(got.logprobs, chosen[:, 0].numpy(), atol=TOLERANCE, rtol=0)
            # Every token is one that the control keeps: so few are likelier, and so much mass is.
            above = logprobs > chosen
            assert int(above.sum(-1).max()) < control.get("top_k", 10**9)
            assert float((logprobs.exp() * above).sum(-1).max()) < control.get("top_p", 1.0) + 1e-6


def test_a_pause_that_aborts_gives_back_what_there_is_and_takes_new_requests_on_resume(served: Served) -> None:
    served.load(0)
    running = served.in_background([ask("a", 1500, n=2)])
    time.sleep(0.5)
    served.engine.pause("abort")
    try:
        (group,) = running.result(timeout=30)
        for got in group:
            assert got.finish_reason == "abort" and 0 < len(got.tokens) < 1500
            assert_own_logprobs(served.models[0], PROMPT, got)
        later = served.in_background([ask("b", 8)])
        time.sleep(0.5)
        assert not later.done() and served.engine.healthy()
        new = served.load(1)
    finally:
        served.engine.resume()
    ((got,),) = later.result(timeout=60)
    assert (got.weight_versions == new).all()
    assert_own_logprobs(served.models[1], PROMPT, got)


def test_a_pause_in_place_keeps_stale_keys_so_that_later_tokens_match_neither_model(served: Served) -> None:
    old = served.load(0)
    running = served.in_background([ask("i", 700)])
    time.sleep(0.5)
    served.engine.pause("in_place")
    try:
        time.sleep(0.2)
        assert not running.done()
        new = served.load(1)
    finally:
        served.engine.resume()
    ((got,),) = running.result(timeout=120)
    assert got.finish_reason == "length" and len(got.tokens) == 700
    assert_span(served.models[0], PROMPT, got, old)
    later = got.weight_versions == new
    assert later.any()
    for model in served.models:
        assert np.abs(plain_logprobs(model, PROMPT, got.tokens) - got.logprobs)[later].max() > 1e-2
    # An update outside of that mode flushes what is stale.
    served.load(1)
    ((clean,),) = served.engine.generate([ask("clean", 30, prompt=np.concatenate([PROMPT, got.tokens[:40]]))])
    assert_own_logprobs(served.models[1], np.concatenate([PROMPT, got.tokens[:40]]), clean)


def test_a_cut_response_goes_on_under_newer_weights_and_each_part_is_of_its_own(served: Served) -> None:
    old = served.load(0)
    whole = ask("cut", 600, n=2, seed=11)
    running = served.in_background([whole])
    time.sleep(0.4)
    served.engine.abort("cut")
    (partial,) = running.result(timeout=30)
    new = served.load(1)
    rest = served.engine.generate([continuation(whole, i, got, f"cut~{i + 2}") for i, got in enumerate(partial)])
    for first, (second,) in zip(partial, rest, strict=True):
        got = joined(first, second)
        assert len(got.tokens) == 600 and got.finish_reason == "length"
        assert got.tokens[: len(first.tokens)].tolist() == first.tokens.tolist()
        assert_span(served.models[0], PROMPT, got, old)
        assert_span(served.models[1], PROMPT, got, new)


def test_a_response_cut_and_continued_under_the_same_weights_is_the_one_never_cut(served: Served) -> None:
    if served.kind == "sglang":
        pytest.skip("SGLang honours seeds with --enable-deterministic-inference only, which has no CPU backend")
    served.load(0)
    whole = ask("w", 900, n=2, seed=5)
    (expected,) = served.engine.generate([whole])
    running = served.in_background([whole])
    time.sleep(0.3)
    served.engine.abort("w")
    (partial,) = running.result(timeout=30)
    rest = served.engine.generate([continuation(whole, i, got, f"w~{i + 2}") for i, got in enumerate(partial)])
    for first, (second,), uncut in zip(partial, rest, expected, strict=True):
        assert 0 < len(first.tokens) < 900
        assert joined(first, second).tokens.tolist() == uncut.tokens.tolist()


def test_a_response_that_was_looked_at_under_way_is_the_one_that_was_not(served: Served) -> None:
    served.load(0)
    pool = EnginePool([served.engine])
    whole = ask("seen", 900, n=2, seed=5)
    (running,) = pool.submit([whole])
    time.sleep(0.3)
    parts = pool.partials()["seen"]
    time.sleep(0.2)
    later = pool.partials()["seen"]
    ends = [running.result(timeout=120)]
    # A process after this one has no more than what was seen.
    ends += [
        f.result(timeout=120) for f in EnginePool([served.engine]).submit([replace(whole, id="taken up")], [parts])
    ]
    for end in ends:
        for first, second, got in zip(parts, later, end, strict=True):
            assert first is not None and second is not None and 0 < len(first.tokens) <= len(second.tokens) <= 900
            assert got.tokens[: len(first.tokens)].tolist() == first.tokens.tolist() and got.retries == ()
            np.testing.assert_array_equal(got.logprobs[: len(first.tokens)], first.logprobs)
            assert_own_logprobs(served.models[0], PROMPT, got)
    assert pool.take_counts() == {}
    if served.kind == "reference":  # SGLang honours seeds on a GPU only
        (expected,) = served.engine.generate([whole])
        assert [got.tokens.tolist() for end in ends for got in end] == [got.tokens.tolist() for got in expected] * 2


def scheduler_of(served: Served) -> int:
    """The process that computes. The lowest pid of the session is the guard's, the next the server's."""
    process = served.engine._process
    assert process is not None
    if served.kind == "reference":
        return max(process.pids())
    names = {pid: (Path("/proc") / str(pid) / "cmdline").read_text() for pid in process.pids()}
    return next(pid for pid, name in names.items() if "scheduler" in name)


def test_a_hung_engine_is_told_from_a_busy_and_a_paused_one(served: Served) -> None:
    served.load(0)

    def alive(patience_s: float) -> None:
        io_loop.wait_for(sign_of_life(served.engine, patience_s))

    running = served.in_background([ask("busy", 1500, n=8)])
    time.sleep(0.3)
    alive(20)
    served.engine.pause()
    alive(20)
    os.kill(scheduler_of(served), signal.SIGSTOP)
    try:
        with pytest.raises(EngineDown, match=rf"{served.engine.url} hangs: no sign of life for 1 s"):
            alive(1)
    finally:
        os.kill(scheduler_of(served), signal.SIGCONT)
    served.engine.resume()
    served.engine.abort()
    running.result(timeout=60)
    alive(20)
