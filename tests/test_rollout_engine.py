"""What every rollout engine must do, asked of the reference engine and of SGLang (where it is installed) alike."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_checkpoints import EOS, ROUTING, VOCABULARY, load_plain, plain_logprobs, plain_routing, save_checkpoint

from megatron_vespo.rollout import EngineError, GenerateRequest, Generation, HttpEngine, SamplingParams, launch_engine
from megatron_vespo.rollout.process import free_port

pytestmark = pytest.mark.slow
TOLERANCE = 2e-5
SGLANG_MISSING = importlib.util.find_spec("sglang") is None
PROMPT = np.array([7, 3, 99, 140, 20, 61, 8], np.int32)


@dataclass
class Served:
    """A running engine and the two checkpoints it is switched between."""

    kind: str
    engine: HttpEngine
    folders: tuple[Path, Path]
    models: tuple[torch.nn.Module, torch.nn.Module]
    version: int = 0

    def load(self, index: int) -> int:
        self.version += 1
        self.engine.update_weights_from_disk(self.folders[index], self.version)
        return self.version


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(root / "first", seed=1), save_checkpoint(root / "second", seed=2)


@pytest.fixture(
    scope="module",
    params=[
        "reference",
        pytest.param(
            "sglang",
            marks=[pytest.mark.sglang, pytest.mark.skipif(SGLANG_MISSING, reason="SGLang is missing: `make sglang`")],
        ),
    ],
)
def served(
    request: pytest.FixtureRequest, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    log_file = tmp_path_factory.mktemp("logs") / f"{request.param}.log"
    engine = launch_engine(
        request.param, folders[0], log_file=log_file, precision="fp32", routed_experts=True, request_timeout_s=120
    )
    process = engine._process
    assert process is not None and process.pids()
    yield Served(request.param, engine, folders, (load_plain(folders[0]), load_plain(folders[1])))
    engine.shutdown()
    assert process.pids() == [], "shutdown left processes behind"


def ask(name: str, max_tokens: int, *, n: int = 1, prompt: np.ndarray = PROMPT, **sampling) -> GenerateRequest:
    return GenerateRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **sampling), n=n)


def assert_own_logprobs(model: torch.nn.Module, prompt: np.ndarray, got: Generation, temperature: float = 1.0) -> None:
    expected = plain_logprobs(model, prompt, got.tokens, temperature)
    np.testing.assert_allclose(got.logprobs, expected, atol=TOLERANCE, rtol=0)


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


def in_background(served: Served, requests: list[GenerateRequest]) -> Future[list[list[Generation]]]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(served.engine.generate, requests)
    pool.shutdown(wait=False)
    return future


def test_paused_responses_go_on_under_new_weights_with_versions_kept(served: Served) -> None:
    old = served.load(0)
    answer = in_background(served, [ask("a", 800, n=2), ask("b", 500, prompt=PROMPT[:3])])
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
            span = got.weight_versions == version
            expected = plain_logprobs(model, prompt, got.tokens)
            np.testing.assert_allclose(got.logprobs[span], expected[span], atol=TOLERANCE, rtol=0)


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
    answer = in_background(served, [request])
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
    answer = in_background(served, [request])
    time.sleep(0.5)
    served.engine.abort("cut")
    ((got,),) = answer.result(timeout=30)
    assert got.finish_reason == "abort" and 0 < len(got.tokens) < 1500
    assert_own_routing(served, 0, PROMPT, got, slice(None))


def test_an_engine_says_whether_it_returns_routing(served: Served) -> None:
    assert served.engine.returns_routing()


def test_abort_ends_one_group_or_all_with_what_they_have(served: Served) -> None:
    served.load(0)
    answer = in_background(served, [ask("x", 1500, n=2), ask("x1", 1500)])
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


# --- the process, with the kind that starts fastest --------------------------------------------------------------


def test_a_dead_engine_is_reported_at_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    engine = launch_engine("reference", folders[0], log_file=tmp_path / "log", precision="fp32")
    process = engine._process
    assert process is not None
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engine.generate, [ask("lost", 2000)])
        time.sleep(0.3)
        started = time.monotonic()
        # The guard is the session's leader, the lowest pid; the engine is its child.
        os.kill(max(process.pids()), signal.SIGKILL)
        with pytest.raises(EngineError, match=rf"{engine.url}.*'lost'"):
            answer.result(timeout=10)
    with pytest.raises(EngineError, match=rf"{engine.url} is dead.*'again'.*exited with code 137(?s:.)*{tmp_path}"):
        while True:  # the guard reports its child's end within a fraction of a second
            engine.generate([ask("again", 4)])
    assert time.monotonic() - started < 5 and not engine.healthy()
    engine.shutdown()
    assert process.pids() == []


def test_an_address_where_nothing_listens_is_reported() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(EngineError, match=rf"{url} is unreachable.*'p'.*rollout.urls"):
        HttpEngine(url).generate([ask("p", 4)])
    with pytest.raises(EngineError, match=rf"{url} is unreachable.*pause_generation"):
        HttpEngine(url).pause()
    assert time.monotonic() - started < 5


def test_a_bad_model_path_fails_the_launch_with_the_end_of_the_log(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match=rf"exited with code 2(?s:.)*{tmp_path}/nowhere holds no config.json"):
        launch_engine("reference", tmp_path / "nowhere", log_file=tmp_path / "logs" / "log", precision="fp32")
    assert time.monotonic() - started < 40


def test_the_engine_does_not_outlive_its_parent(folders: tuple[Path, Path], tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from megatron_vespo.rollout import launch_engine\n"
        "engine = launch_engine('reference', Path(sys.argv[1]), log_file=Path(sys.argv[2]), precision='fp32')\n"
        "print(*engine._process.pids(), flush=True); time.sleep(100)"
    )
    arguments = [sys.executable, "-c", program, str(folders[0]), str(tmp_path / "log")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.1)
