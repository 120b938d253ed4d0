"""Engines that are not this run's loopback children: on another cluster's nodes, or started by someone else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
from local_launcher import KEY, LocalLauncher
from tiny_run import make_run, processes_about, records, start, train, wait_until

from megatron_vespo.cli import main
from megatron_vespo.ports import free_port

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster that someone else started."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="ray")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    options = [f"--temp-dir={folder}", "--num-cpus=8", "--include-dashboard=false", "--disable-usage-stats"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout is not None
        assert any("Ray runtime started" in line for line in head.stdout), "ray start failed"
        yield f"{ray.util.get_node_ip_address()}:{port}"
        head.terminate()
        head.communicate(timeout=30)
    shutil.rmtree(folder, ignore_errors=True)


def test_engines_on_a_joined_cluster_listen_on_their_node_and_want_a_key(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = cluster.partition(":")[0]
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback's")
    config = make_run(tmp_path, train={"steps": 500}, cluster={"ranks_per_node": 1})
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    code, _, err = train(config, f"cluster.address={cluster}")
    assert code == 1 and "set RAY_AUTH_MODE=token" in err
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    process = start(config, f"cluster.address={cluster}")
    wait_until(lambda: len(records(tmp_path / "run")) > 1, 300, "first step")
    engines = {
        pid: Path(f"/proc/{pid}/environ").read_text()
        for pid in processes_about(str(tmp_path))
        if "megatron_vespo.rollout.reference" in Path(f"/proc/{pid}/cmdline").read_text()
    }
    commands = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in engines]
    (url,) = {f"http://{words[words.index('--host') + 1]}:{words[words.index('--port') + 1]}" for words in commands}
    assert url.startswith(f"http://{address}:")
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    assert httpx.get(f"{url}/model_info", trust_env=False).status_code == 401
    variables = [v for text in engines.values() for v in text.split("\0") if v.startswith("MEGATRON_VESPO_ENGINE_KEY=")]
    (key,) = {variable.partition("=")[2] for variable in variables}
    assert len(key) >= 32
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(key.encode() in path.read_bytes() for path in written)
    assert not any(key in word for words in commands for word in words)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    wait_until(lambda: not processes_about(str(tmp_path / "run")), 30, "all of the run's processes ended")


def test_a_run_on_engines_that_someone_else_started_survives_the_loss_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, rollout={"urls_key_env": "THEIR_KEY"})
    launchers = [LocalLauncher("reference", tmp_path / f"theirs-{i}.log") for i in range(2)]
    # They serve something else under another version: the run gives them its own weights before it asks for anything.
    with ThreadPoolExecutor(2) as threads:
        engines = list(threads.map(lambda launcher: launcher.launch(tmp_path / "model", 41), launchers))
    override = f"rollout.urls=[{engines[0].url}, {engines[1].url}]"
    try:
        monkeypatch.delenv("THEIR_KEY", raising=False)
        assert main(["train", str(config), override]) == 2, "the key is missing, and nothing was started"
        monkeypatch.setenv("THEIR_KEY", "wrong")
        code, _, err = train(config, override)
        assert code == 1 and "HTTP 401" in err and "rollout.urls_key_env" in err, err
        monkeypatch.setenv("THEIR_KEY", KEY)
        process = start(config, override, "train.steps=6")
        wait_until(lambda: len(records(tmp_path / "run")) > 1, 300, "first step")
        lost = engines[0]._process
        assert lost is not None
        os.kill(max(lost.pids()), signal.SIGKILL)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        assert [r["step"] for r in records(tmp_path / "run") if "eval" not in r] == [1, 2, 3, 4, 5, 6]
        assert "started by someone else" in (tmp_path / "run" / "logs" / "rollout.log").read_text()
        assert engines[1].healthy() and engines[1].weight_version() == 12, "it is not the run's to end"
    finally:
        for engine in engines:
            engine.shutdown()
