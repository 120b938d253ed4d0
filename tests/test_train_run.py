"""``megatron-vespo train`` as a user runs it: driver, Ray, two Megatron ranks, an engine, reward workers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chaos import chaos
from safetensors.torch import load_file
from tiny_run import (
    descendants,
    make_checkpoint,
    make_run,
    processes_about,
    records,
    running,
    start,
    train,
    wait_until,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vespo.config.load import load_config
from megatron_vespo.loop.replay import load_run, micro_batches, read_updates
from megatron_vespo.observe.weight_health import health_metrics
from megatron_vespo.policy.objective import objective_of
from megatron_vespo.policy.response_weights import weigh_trained
from megatron_vespo.samples.accounting import account
from megatron_vespo.samples.store import batch_file, read_batch, stored_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_run(folder, checkpoint={"every": 2}, train={"steps": 4})
    code, out, err = train(config)
    assert code == 0, out + err
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder / "run") if "eval" not in record]


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    run = finished / "run"
    for name in ("config.resolved.yaml", "metrics.jsonl", "report.html", "hf", "logs", "checkpoints/step_000004"):
        assert (run / name).exists(), name
    assert [r["step"] for r in steps(finished)] == [1, 2, 3, 4]
    assert [r["version"] for r in steps(finished)] == [2, 4, 6, 8]
    assert [r["step"] for r in records(run) if "eval" in r] == [0, 4]
    assert (run / "samples" / "step_000004.md").read_text().count("Response:") == 4
    assert {path.name for path in (run / "logs").iterdir()} >= {"trainer-0.log", "trainer-1.log", "engine-0.log"}
    assert not processes_about(str(run))


def test_engine_and_trainer_agree_before_and_after_each_sync(finished: Path) -> None:
    for record in steps(finished):
        assert record["rollout_logprob_diff"] < 1e-5
        # Of two mini-batches the second is one version old.
        assert record["staleness_mean"] == pytest.approx(0.5, abs=0.2) and record["staleness_max"] == 1
    assert all(record["sync_probe_max"] < 1e-4 for record in steps(finished)[1:])
    assert all(record["grad_norm"] > 0 for record in steps(finished))


def test_the_rollouts_are_stored_with_the_logprobs_they_were_trained_at(finished: Path) -> None:
    folder = finished / "run" / "rollouts"
    assert stored_steps(folder) == [1, 2, 3, 4]
    samples = read_batch(batch_file(folder, 2))
    assert [s.trained_version for s in samples] == [2] * 16 + [3] * 16  # a batch is two updates
    moved = [float(np.abs(s.train_logprobs - s.old_logprobs).max(initial=0)) for s in samples]
    # The first update sees the weights that sampled, the second those of the first.
    assert max(moved[:16]) < 1e-5 < 1e-4 < max(moved[16:])


def test_a_stored_batch_replays_to_the_loss_that_was_logged(finished: Path) -> None:
    run = finished / "run"
    objective = objective_of(load_run(run))
    losses = [objective(inputs).loss.item() for m in read_updates(run, 2) for inputs in micro_batches(m.samples)]
    assert len(losses) == 2  # an update each
    logged = steps(finished)[1]["loss"]
    assert logged == pytest.approx(sum(losses) / 2, rel=1e-5, abs=1e-6)


def test_a_steps_weight_health_is_that_of_its_stored_rollouts(finished: Path) -> None:
    config = load_config(finished / "run" / "config.resolved.yaml").run
    for record in steps(finished):
        samples = read_batch(batch_file(finished / "run" / "rollouts", record["step"]))
        expected = health_metrics(weigh_trained(objective_of(config), samples))
        assert {name: record.get(name) for name in record if name.startswith("health/")} == pytest.approx(expected)
        assert record["health/log_w_stale/p95"] > 1e-4 > abs(record["health/log_w_engine/p95"])
    report = (finished / "run" / "report.html").read_text()
    assert "Mismatch budget" in report and "Dead responses" in report


def test_the_export_loads_in_transformers_and_differs_from_the_start(finished: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(finished / "run" / "hf")
    initial = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokens = AutoTokenizer.from_pretrained(finished / "run" / "hf")("1+2 =", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (exported(tokens).logits - initial(tokens).logits).abs().max() > 1e-3


def test_killed_again_and_again_a_run_equals_the_undisturbed_one(finished: Path, tmp_path: Path) -> None:
    """Engine, driver (with the newest checkpoint damaged), trainer rank; `make chaos` does thirty such rounds."""
    state = chaos(
        tmp_path, finished / "tiny.yaml", finished / "run", ("engine", "checkpoint", "trainer"), random.Random(1)
    )
    assert state.kills == 3 and state.undone > 0
    assert state.started == 2, "the driver was killed once, and survived the deaths of the others"
    said = [(state.folder / f"{i}.log").read_text() for i in range(1, state.started + 1)]
    assert "The trainers are started again, the engines stay: restart 1 of 3" in said[1]
    assert any(": damaged (" in text and "the run goes on from the one before" in text for text in said)
    wait_until(lambda: not processes_about(str(tmp_path)), 120, "all processes ended")


@pytest.mark.parametrize("mode", ["r2", "r3"])
def test_routing_is_replayed_through_a_run(tmp_path: Path, mode: str) -> None:
    model = {"routing_replay": mode, "router_z_loss": 0.01}
    config = make_run(tmp_path, model=model, train={"steps": 2}, checkpoint={"export_hf": False})
    code, out, err = train(config)
    assert code == 0, out + err
    for record in steps(tmp_path):
        assert record["rollout_logprob_diff"] < 1e-5
        # In float32 engine and trainer agree; the second update of a step finds its router moved.
        assert record.get("routing_mismatch_engine", -1.0) == (-1.0 if mode == "r2" else 0.0)
        assert 0 < record["routing_mismatch_update"] < 0.5 and record["router_z_loss"] > 0
    samples = read_batch(batch_file(tmp_path / "run" / "rollouts", 2))
    for s in samples:
        if mode == "r2":
            assert s.routed_experts is None
        else:
            assert s.routed_experts.shape == (s.length - 1, 2, 2) and s.routed_experts.dtype == np.uint8


def is_engine(pid: int) -> bool:
    return "megatron_vespo.rollout.reference" in Path(f"/proc/{pid}/cmdline").read_text()


def is_engine_host(pid: int) -> bool:
    return "EngineHost" in Path(f"/proc/{pid}/cmdline").read_text()


def is_ray_agent(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_text().startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))


def kill_those(folder: Path, which: Callable[[int], bool]) -> None:
    pids = [pid for pid in processes_about(str(folder)) if which(pid)]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_with_its_engine_killed_twice_a_run_equals_the_undisturbed_one(finished: Path, tmp_path: Path) -> None:
    """Weights that lie in no folder; the chaos above kills an engine under the disk transport."""
    config = make_run(tmp_path, checkpoint={"every": 2}, train={"steps": 4})
    process = start(config, "sync.transport=shared_memory")
    log = tmp_path / "run" / "logs" / "rollout.log"
    wait_until(lambda: len(records(tmp_path / "run")) > 0, 300, "first evaluation")
    kill_those(tmp_path, is_engine)
    wait_until(lambda: log.read_text().count("runs again") == 1, 300, "first restart")
    kill_those(tmp_path, is_engine_host)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert log.read_text().count("runs again") == 2 and "engine-0.log" in log.read_text()
    assert sum(record.get("engine_restarts", 0) for record in steps(tmp_path)) == 2
    for name in ("reward", "loss", "grad_norm", "w/mean", "response_length", "entropy"):
        assert [r[name] for r in steps(tmp_path)] == [r[name] for r in steps(finished)], name
    ours, theirs = (load_file(folder / "run" / "hf" / "model.safetensors") for folder in (tmp_path, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    wait_until(lambda: not processes_about(str(tmp_path)), 20, "all processes ended")


def test_on_shared_devices_a_run_equals_one_apart_and_each_side_gives_way(finished: Path, tmp_path: Path) -> None:
    """Its engine is killed once: what replaces it takes its turns too, and the weights that lie in no folder."""
    config = make_run(tmp_path, checkpoint={"every": 2}, train={"steps": 4})
    process = start(config, "cluster.colocate=true", "sync.transport=ipc")
    wait_until(lambda: len(records(tmp_path / "run")) > 1 or process.poll() is not None, 300, "first step")
    kill_those(tmp_path, is_engine)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    for name in ("reward", "loss", "grad_norm", "w/mean", "response_length", "entropy"):
        assert [r[name] for r in steps(tmp_path)] == [r[name] for r in steps(finished)], name
    ours, theirs = (load_file(folder / "run" / "hf" / "model.safetensors") for folder in (tmp_path, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # To train, to hand over the weights, and (of the record before in the first one, which has no probe yet) to sample.
    assert [record["turns"] >= 3 for record in steps(tmp_path)] == [False, True, True, True]
    assert all(record["turn_seconds"] > 0 for record in steps(tmp_path))
    assert all(record["turn_bytes"] == 0 for record in steps(tmp_path)), "on a CPU the trainer has nothing to move"
    wait_until(lambda: not processes_about(str(tmp_path)), 60, "all processes ended")


@pytest.mark.parametrize("transport", ["shared_memory", "broadcast"])
def test_a_rank_that_dies_in_the_middle_of_a_sync_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Asynchronous, with deltas: the engines hold half a version that nobody has any more, and go back to an older."""
    monkeypatch.setenv("DYING_RANK", str(tmp_path / "died"))
    config = make_run(
        tmp_path,
        objective={"name": "dying_rank.vespo"},
        data={"evaluate": None},
        train={"mode": "asynchronous", "steps": 3, "mini_batches": 1, "prompts_per_step": 4},
        checkpoint={"every": 1, "export_hf": False},
        sync={"transport": transport, "delta": True, "bucket_mb": 1, "timeout_s": 60},
    )
    code, out, err = train(config)
    assert code == 0, out + err
    assert (tmp_path / "died").exists() and out.count("The trainers are started again, the engines stay") == 1
    assert "trainer rank 0 failed" in out and "engine_restarts" not in json.dumps(records(tmp_path / "run"))
    assert [r["step"] for r in steps(tmp_path)] == [1, 2, 3]
    assert steps(tmp_path)[-1]["sync_probe_max"] < 1e-4
    counted = account(tmp_path / "run")
    assert counted.balances and sorted(counted.updates) == [0, 1, 2] and set(counted.updates.values()) == {16}
    assert len(counted.rollbacks) == 1


def test_without_restarts_a_dead_engine_ends_the_run_with_one_message_and_nothing_left(tmp_path: Path) -> None:
    process = start(make_run(tmp_path, train={"steps": 500}), "rollout.max_restarts=0")
    wait_until(lambda: len(records(tmp_path / "run")) > 1, 300, "first step")
    kill_those(tmp_path, is_engine)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: http://127.0.0.1:" in err and "end of" in err and "engine-0.log" in err and "Traceback" not in err
    wait_until(lambda: not processes_about(str(tmp_path)), 20, "all processes ended")


@pytest.mark.parametrize("how", ["terminated", "ctrl-c", "killed"])
def test_an_interrupted_run_leaves_nothing_running(tmp_path: Path, how: str) -> None:
    process = start(make_run(tmp_path, train={"steps": 500}), new_session=True)
    wait_until(lambda: len(records(tmp_path / "run")) > 1, 300, "first step")
    # After a kill -9 two helpers of Ray's try for a minute or two to tell its dead head so, and then end too.
    family = {pid for pid in descendants(process.pid) if not (how == "killed" and is_ray_agent(pid))}
    assert len(family) > 6, "Ray, two ranks, a host and its engine, a grader"
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    else:
        process.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if how == "killed" else 130), err
    wait_until(lambda: not processes_about(str(tmp_path)), 120, "all processes ended")
    wait_until(lambda: not any(running(pid) for pid in family), 120, "Ray's own ended too")


def another_checkpoint(folder: Path) -> list[str]:
    make_checkpoint(folder / "wider", hidden_size=64)
    return [f"model.path={folder / 'wider'}", f"run_dir={folder / 'run'}"]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (another_checkpoint, "hidden_size is 32 there and 64 here"),
        (lambda folder: ["checkpoint.resume=false"], "holds the checkpoints of an earlier run"),
    ],
)
def test_what_does_not_fit_the_checkpoints_is_refused_before_anything_starts(
    finished: Path,
    tmp_path: Path,
    refusal: Callable[..., str],
    prepare: Callable[[Path], list[str]],
    expected: str,
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(finished, folder)
    assert expected in refusal(folder / "tiny.yaml", *prepare(folder))


def calculator(episode: Any) -> None:
    """A tool that speaks after each eight tokens; for rollout.function."""
    while episode.room >= 8:
        episode.sample(max_tokens=8)
        episode.append(episode.tokenizer.encode("1+1=2"))


def test_tools_dynamic_sampling_and_overlong_filtering_together(tmp_path: Path) -> None:
    config = make_run(
        tmp_path,
        train={"steps": 2, "mask_truncated": True},
        rollout={"function": "test_train_run.calculator", "dynamic_sampling": True, "max_response_tokens": 24},
        reward={"overlong_buffer": 8, "overlong_penalty": 0.5},
        sync={"probe_tolerance": None},
    )
    code, out, err = train(config)
    assert code == 0, out + err
    for record in steps(tmp_path):
        assert record["dynamic_sampling/groups_asked"] >= 8 and record["grad_norm"] >= 0
        assert record["rollout_logprob_diff"] < 1e-5  # of the policy's tokens alone
    for sample in read_batch(batch_file(tmp_path / "run" / "rollouts", 2)):
        penalty = 0.5 * max(0, len(sample.response_tokens) - 16) / 8
        assert sample.grade - sample.reward == pytest.approx(penalty)
        if sample.finish_reason == "length":
            assert not sample.loss_mask.any()
        else:
            assert 0 < sample.loss_mask.sum() < len(sample.loss_mask)
