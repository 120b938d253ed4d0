"""What every rollout engine must do, asked of the reference engine and of SGLang (where it is installed) alike."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from rollout_checkpoints import EOS, ROUTING, VOCABULARY, plain_logprobs, plain_routing
from served_engines import PROMPT, TOLERANCE, Served, ask, assert_own_logprobs, assert_span

from megatron_vespo.rollout import EngineError, Generation

pytestmark = pytest.mark.slow


def test_logprobs_are_those_of_transformers(served: Served) -> None:
    served.load(0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, size).astype(np.int32) for size in (1, 2, 7, 7, 31, 64)]
    answers = served.engine.generate([ask(f"p{i}", 20 + 5 * i, prompt=p, n=2) for i, p in enumerate(prompts)])
    for i, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        assert len(group) == 2
        for got in group:
            assert got.finish_reason == "length" and len(got.tokens) == 20 + 5 * i
            assert got.tokens.dtype == np.int32 and got.logprobs.dtype == np.float32
            assert (got.weight_versions == served.version).all()
            assert_own_logprobs(served.models[0], prompt, got)


def test_logprobs_are_at_the_temperature_and_before_top_k_and_top_p(served: Served) -> None:
    served.load(0)
    (plain,), (cut,) = served.engine.generate(
        [ask("t", 30, temperature=0.6), ask("k", 30, temperature=1.4, top_k=3, top_p=0.9)]
    )
    assert_own_logprobs(served.models[0], PROMPT, plain, temperature=0.6)
    assert_own_logprobs(served.models[0], PROMPT, cut, temperature=1.4)
    with torch.no_grad():
        logits = served.models[0](torch.tensor(np.concatenate([PROMPT, cut.tokens]), dtype=torch.long)[None]).logits[0]
    rank = (
        logits[len(PROMPT) - 1 : -1]
        > logits[len(PROMPT) - 1 : -1].gather(-1, torch.tensor(cut.tokens, dtype=torch.long)[:, None])
    ).sum(-1)
    assert int(rank.max()) < 3


def test_greedy_is_the_greedy_of_transformers(served: Served) -> None:
    served.load(0)
    ((got,),) = served.engine.generate([ask("g", 24, temperature=0.0)])
    tokens = torch.tensor(PROMPT, dtype=torch.long)[None]
    with torch.no_grad():
        expected = served.models[0].generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=-1)[
            0, len(PROMPT) :
        ]
    assert got.tokens.tolist() == expected.tolist()
    assert_own_logprobs(served.models[0], PROMPT, got)


def test_the_responses_of_a_group_differ(served: Served) -> None:
    ((*group,),) = served.engine.generate([ask("n", 16, n=8)])
    assert len(group) == 8 and len({tuple(got.tokens.tolist()) for got in group}) == 8


def test_a_stop_token_ends_the_response_and_is_part_of_it(served: Served) -> None:
    served.load(0)
    ((whole,),) = served.engine.generate([ask("w", 24, temperature=0.0)])
    stop = int(whole.tokens[9])
    end = whole.tokens.tolist().index(stop) + 1
    ((got,),) = served.engine.generate([ask("s", 24, temperature=0.0, stop_token_ids=(stop, EOS))])
    assert got.finish_reason == "stop" and got.tokens.tolist() == whole.tokens[:end].tolist()
    assert len(got.logprobs) == len(got.weight_versions) == end
    # Without stop tokens not even the checkpoint's own end-of-sequence token ends a response.
    ((long,),) = served.engine.generate([ask("l", 1000, temperature=1.5)])
    assert EOS in long.tokens[:-1] and long.finish_reason == "length" and len(long.tokens) == 1000


def test_score_is_the_logprobs_of_given_tokens(served: Served) -> None:
    served.load(0)
    rng = np.random.default_rng(3)
    sequences = [rng.integers(3, VOCABULARY, size).astype(np.int32) for size in (2, 40, 9, 9)]
    for sequence, scored in zip(sequences, served.engine.score(sequences), strict=True):
        expected = plain_logprobs(served.models[0], sequence[:1], sequence[1:])
        np.testing.assert_allclose(scored, expected, atol=TOLERANCE, rtol=0)


def test_new_weights_give_their_own_logprobs_and_version(served: Served) -> None:
    for index in (1, 0):
        version = served.load(index)
        assert served.engine.weight_version() == version
        ((got,),) = served.engine.generate([ask(f"u{index}", 16)])
        assert (got.weight_versions == version).all()
        assert_own_logprobs(served.models[index], PROMPT, got)
        assert np.abs(plain_logprobs(served.models[1 - index], PROMPT, got.tokens) - got.logprobs).max() > 0.1


def test_paused_responses_go_on_under_new_weights_with_versions_kept(served: Served) -> None:
    old = served.load(0)
    answer = served.in_background([ask("a", 800, n=2), ask("b", 500, prompt=PROMPT[:3])])
    time.sleep(0.5)
    served.engine.pause()
    try:
        time.sleep(0.3)
        assert not answer.done() and served.engine.healthy()
        new = served.load(1)
    finally:
        served.engine.resume()
    (first, second), (third,) = answer.result(timeout=120)
    for prompt, got in ((PROMPT, first), (PROMPT, second), (PROMPT[:3], third)):
        assert got.weight_versions[0] == old and got.weight_versions[-1] == new
        assert (np.diff(got.weight_versions) >= 0).all()
        for version, model in zip((old, new), served.models, strict=True):
            assert_span(model, prompt, got, version)


def assert_own_routing(served: Served, index: int, prompt: np.ndarray, got: Generation, tokens: slice) -> None:
    """``tokens`` of prompt and response went where transformers sends them, slot by slot."""
    expected = plain_routing(served.models[index], np.concatenate([prompt, got.tokens]))
    assert got.routed_experts is not None and got.routed_experts.dtype == np.uint8
    assert got.routed_experts.shape == (len(prompt) + len(got.tokens) - 1, *expected.shape[1:])
    np.testing.assert_array_equal(got.routed_experts[tokens], expected[:-1][tokens])


def test_the_routing_is_that_of_transformers(served: Served) -> None:
    for index in (1, 0):
        served.load(index)
        prompts = [PROMPT, PROMPT[:1], np.tile(PROMPT, 9)]
        requests = [ask(f"r{index}{i}", 12 + 30 * i, prompt=p, n=3) for i, p in enumerate(prompts)]
        for i in (0, 2):  # the one between is not asked for its own
            requests[i].routing = ROUTING
        first, second, third = served.engine.generate(requests)
        assert all(got.routed_experts is None for got in second)
        for prompt, group in ((PROMPT, first), (prompts[2], third)):
            for got in group:
                assert_own_routing(served, index, prompt, got, slice(None))


def test_after_a_swap_the_reference_engine_keeps_the_routing_that_sampled_and_sglang_the_newest(served: Served) -> None:
    old = served.load(0)
    request = ask("swapped", 700)
    request.routing = ROUTING
    answer = served.in_background([request])
    time.sleep(0.5)
    served.engine.pause()
    try:
        served.load(1)
    finally:
        served.engine.resume()
    ((got,),) = answer.result(timeout=120)
    # The last token that the old weights sampled is first computed by the new ones.
    computed_by_old = len(PROMPT) + int((got.weight_versions == old).sum()) - 1
    assert len(PROMPT) < computed_by_old < len(PROMPT) + 699
    before, after = slice(computed_by_old), slice(computed_by_old, None)
    assert_own_routing(served, 0 if served.kind == "reference" else 1, PROMPT, got, before)
    assert_own_routing(served, 1, PROMPT, got, after)


def test_an_aborted_response_has_the_routing_of_what_it_has(served: Served) -> None:
    served.load(0)
    request = ask("cut", 1500)
    request.routing = ROUTING
    answer = served.in_background([request])
    time.sleep(0.5)
    served.engine.abort("cut")
    ((got,),) = answer.result(timeout=30)
    assert got.finish_reason == "abort" and 0 < len(got.tokens) < 1500
    assert_own_routing(served, 0, PROMPT, got, slice(None))


def test_an_engine_says_whether_it_returns_routing(served: Served) -> None:
    assert served.engine.returns_routing()


def test_abort_ends_one_group_or_all_with_what_they_have(served: Served) -> None:
    served.load(0)
    answer = served.in_background([ask("x", 1500, n=2), ask("x1", 1500)])
    time.sleep(0.5)
    served.engine.abort("x")
    time.sleep(0.3)
    assert not answer.done(), "the other group was aborted too"
    served.engine.abort()
    (*group,), (other,) = answer.result(timeout=30)
    for got in (*group, other):
        assert got.finish_reason == "abort" and 0 < len(got.tokens) < 1500
        assert_own_logprobs(served.models[0], PROMPT, got)
    assert max(len(got.tokens) for got in group) < len(other.tokens)
    ((after,),) = served.engine.generate([ask("after", 4)])
    assert after.finish_reason == "length"


def test_a_refused_request_names_engine_and_request(served: Served) -> None:
    with pytest.raises(EngineError, match=rf"{served.engine.url} refused .*'too long'.*(?s:.)*(2048|context)"):
        served.engine.generate([ask("too long", 4000)])
    assert served.engine.healthy()


def test_many_threads_may_ask_at_once(served: Served) -> None:
    served.load(0)
    got: list[list[Generation]] = []
    threads = [
        threading.Thread(target=lambda i=i: got.extend(served.engine.generate([ask(f"c{i}", 8 + i, n=3)])))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(len(generation.tokens) for group in got for generation in group) == sorted([*range(8, 14)] * 3)
