"""An engine's process, with the kind that starts fastest: launching, dying, hanging, keys, and nothing left behind."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import SGLANG_MISSING
from local_launcher import KEY, LocalLauncher
from rollout_checkpoints import load_plain
from served_engines import PROMPT, ask, assert_span

from megatron_vespo.ports import free_port
from megatron_vespo.rollout import EngineError, HttpEngine, dispatch, health, launch_engine

pytestmark = pytest.mark.slow


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


class Slow(http.server.BaseHTTPRequestHandler):
    """Loads until ``ready_at``, and then never answers a /generate."""

    ready_at = 0.0

    def do_GET(self) -> None:
        self.send_response(200 if time.monotonic() > Slow.ready_at else 503)
        self.end_headers()

    def do_POST(self) -> None:
        time.sleep(60)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_engine_that_loads_or_compiles_is_waited_for_as_long_as_was_said(
    slow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SAY_EVERY_S", 0.3)
    said: list[str] = []
    Slow.ready_at = time.monotonic() + 1.0
    health.wait_until_ready(slow_server, 30, say=said.append)
    assert time.monotonic() >= Slow.ready_at
    assert said and "it listens, and /health says 503: loading or compiling" in said[0]
    Slow.ready_at = time.monotonic() + 60
    with pytest.raises(EngineError, match=r"was not ready within 0.5 s \(rollout.launch_timeout_s\): it listens, and"):
        health.wait_until_ready(slow_server, 0.5)
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match="nothing listens there yet"):
        health.wait_until_ready(nobody, 0.3)


def test_a_warm_up_that_does_not_end_fails_the_launch_by_name(slow_server: str) -> None:
    with pytest.raises(EngineError, match=r"warm-up \(rollout.warmup_tokens = 4\) within 1 s failed"):
        health.warm_up(HttpEngine(slow_server), 4, 0.6)


def test_an_engine_with_a_key_answers_nobody_without_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"an engine that listens on 127.0.0.2 wants a key"):
        launch_engine("reference", folders[0], log_file=tmp_path / "log", precision="fp32", host="127.0.0.2")
    launcher = LocalLauncher("reference", tmp_path / "log")
    engine = launcher.launch(folders[0], 3)
    process = engine._process
    assert process is not None and engine.url.startswith("http://127.0.0.2:")
    assert engine.healthy() and engine.weight_version() == 3 and len(engine.generate([ask("a", 4)])) == 1
    with pytest.raises(EngineError, match=r"HTTP 401 .*rollout.urls_key_env"):
        HttpEngine(engine.url).generate([ask("b", 4)])
    for wrong in (None, "Bearer wrong", KEY):
        headers = {"Authorization": wrong} if wrong else {}
        for path in ("/pause_generation", "/update_weights_from_disk", "/abort_request"):
            assert httpx.post(engine.url + path, json={}, headers=headers).status_code == 401
    assert HttpEngine(engine.url).healthy()
    commands = [(Path("/proc") / str(pid) / "cmdline").read_text() for pid in process.pids()]
    assert not any(KEY in text for text in [*commands, launcher.log_file.read_text()])
    engine.shutdown()


def test_an_engine_that_is_killed_or_stopped_comes_back_with_the_newest_weights(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PING_EVERY_S", 0.5)
    launcher = LocalLauncher("reference", tmp_path / "log")
    with launcher.pool(folders[0], hang_timeout_s=6.0) as pool:
        pool.update_weights_from_disk(folders[1], 1)
        requests = [ask(f"r{i}", 300, n=2, seed=10 * i) for i in range(3)]
        undisturbed = pool.generate(requests)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            futures = pool.submit(requests)
            time.sleep(0.3)
            (engine,) = pool.engines
            process = engine._process  # type: ignore[attr-defined]
            old = process.pids()
            os.kill(max(old), number)
            answers = [future.result(timeout=90) for future in futures]
            assert not any(Path(f"/proc/{pid}").exists() for pid in old)
            for group, expected in zip(answers, undisturbed, strict=True):
                for got, want in zip(group, expected, strict=True):
                    assert got.tokens.tolist() == want.tokens.tolist()
                    assert (got.weight_versions == 1).all() and len(got.retries) == 1
        assert pool.weight_version() == 1 and pool.take_counts()["engine_restarts"] == 2


@pytest.mark.sglang
@pytest.mark.skipif(SGLANG_MISSING, reason="SGLang is missing: `make sglang`")
def test_sglang_comes_back_with_the_newest_weights_its_key_and_nothing_left_of_the_old(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    # A nested flag, a list and a switch, as a config would pass them through.
    nested = {"json-model-override-args": {"attention_dropout": 0.0}}
    flags = {**nested, "cuda-graph-bs-decode": [1, 2], "log-requests": True}
    launcher = LocalLauncher("sglang", tmp_path / "log", engine_args=flags)
    model = load_plain(folders[1])
    with launcher.pool(folders[0]) as pool:
        (engine,) = pool.engines
        process = engine._process  # type: ignore[attr-defined]
        old = process.pids()
        words = [word for pid in old for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
        assert '{"attention_dropout": 0.0}' in words and "--log-requests" in words
        assert words[words.index("--cuda-graph-bs-decode") + 1 :][:2] == ["1", "2"]
        assert httpx.get(f"{engine.url}/health").status_code == 200
        assert httpx.get(f"{engine.url}/model_info").status_code == 401
        pool.update_weights_from_disk(folders[1], 1)
        futures = pool.submit([ask("a", 400, n=2), ask("b", 400)])
        time.sleep(0.5)
        (scheduler,) = (pid for pid in old if "scheduler" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(scheduler, signal.SIGKILL)
        answers = [future.result(timeout=500) for future in futures]
        assert not any(Path(f"/proc/{pid}").exists() for pid in old)
        assert pool.take_counts()["engine_restarts"] == 1 and pool.weight_version() == 1
        for got in (got for group in answers for got in group):
            assert len(got.tokens) == 400 and len(got.retries) == 1
            assert_span(model, PROMPT, got, 1)
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pool.engines[0]._process.pids()]  # type: ignore[attr-defined]
        assert not any(KEY in text for text in [*commands, launcher.log_file.read_text()])


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
