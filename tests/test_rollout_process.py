"""An engine's process, with the kind that starts fastest: launching, dying, hanging, keys, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served_engines import ask

from megatron_vespo.rollout import EngineError, HttpEngine, launch_engine
from megatron_vespo.rollout.process import free_port

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
