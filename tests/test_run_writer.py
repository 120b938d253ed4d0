"""What a run writes: whole lines at any moment, and after a resume the run that never stopped."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_run import sample, step_record

from megatron_vespo.observe.progress import RunProgress, accuracy_lines, step_line
from megatron_vespo.observe.records import read_records
from megatron_vespo.observe.writer import RunWriter


def steps_in(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_records(run_dir / "metrics.jsonl")]


def test_every_record_is_on_disk_once_written(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": math.nan, "seconds": {"train": np.float32(0.5)}, "grad_norm": math.inf})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert json.loads(text) == {"step": 1, "loss": None, "seconds": {"train": 0.5}, "grad_norm": None}
        assert "NaN" not in text


def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        writer.write({"step": 0, "eval": {"greedy": 0.1}})
        for step in range(1, 6):
            writer.write({"step": step, "reward": 0.5})
            writer.write_samples(step, [sample(step, 0, "x", "1", 0.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # the crash
    with RunWriter(tmp_path, resumed_step=3) as writer:
        assert steps_in(tmp_path) == [0, 1, 2, 3]
        writer.write({"step": 4, "reward": 0.6})
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]
    left = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert left == [f"step_{step:06d}{suffix}" for step in (1, 2, 3) for suffix in (".jsonl", ".md")]


def test_a_new_run_starts_empty_and_keeps_the_older_metrics_aside(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        writer.write({"step": 7})
        writer.write_samples(7, [sample(7, 0, "x", "1", 0.0)])
    RunWriter(tmp_path).close()
    assert steps_in(tmp_path) == []
    assert [r["step"] for r in read_records(tmp_path / "metrics.previous.jsonl")] == [7]
    assert list((tmp_path / "samples").iterdir()) == []


def test_samples_are_readable_and_parse_back(tmp_path: Path) -> None:
    text = "Zwölf \\boxed{12}\n```python\nprint(1)\n```"
    with RunWriter(tmp_path) as writer:
        writer.write_samples(2, [sample(2, 0, text, "12", 1.0)])
    (row,) = map(json.loads, (tmp_path / "samples" / "step_000002.jsonl").read_text().splitlines())
    assert row["response"] == text and row["gold"] == "12" and row["finish_reason"] == "stop"
    assert row["versions"] == [[8, 20], [9, 4]] and row["reward"] == 1.0
    readable = (tmp_path / "samples" / "step_000002.md").read_text()
    assert f"````text\n{text}\n````" in readable
    assert "weight version 8 (20 tokens), 9 (4 tokens)" in readable


@pytest.mark.slow
def test_wandb_offline_leaves_a_run_inside_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    with RunWriter(run_dir, wandb_mode="offline", project="p", name="n", config={"seed": 1}) as writer:
        writer.write({"step": 1, "reward": 0.5, "seconds": {"train": 1.0}})
        writer.write({"step": 1, "eval": {"greedy": 0.5}})
    (data,) = run_dir.glob("logs/wandb/offline-run-*/run-*.wandb")
    content = data.read_bytes()
    assert b"seconds/train" in content and b"eval/greedy" in content
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_step_is_one_line_with_the_numbers_that_matter() -> None:
    record = step_record(12, 60, np.random.default_rng(0))
    out = io.StringIO()
    with RunProgress(60, console=Console(file=out, width=40)) as progress:
        progress.phase("rollout")
        progress.step(record)
        progress.evaluation({"step": 12, "eval": {"greedy": 0.5, "avg@4": 0.25, "n": 200}})
        progress.message("[not markup]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    for part in (
        "step 12/60",
        "reward 0.",
        "acc 0.",
        "len ",
        "W ",
        "ESS 0.",
        "lag 1.5",
        "|Δlogp| ",
        "tok/s",
        "rollout ",
    ):
        assert part in lines[0]
    assert lines[1:] == ["held-out at step 12: greedy 0.500 · avg@4 0.250 (200 problems)", "[not markup]"]


def test_missing_metrics_are_passed_over() -> None:
    assert step_line({"step": 3, "loss": None}, 10) == "step  3/10"
    record = {"step": 3, "w/mean": 1.25, "w/ess": 0.5, "rollout_logprob_diff": 1e-3}
    assert step_line(record, 10) == "step  3/10 · W 1.250 · ESS 0.500 · |Δlogp| 1.0e-03"


def test_accuracy_before_and_after_is_said_at_the_end() -> None:
    records = [{"step": 0, "eval": {"greedy": 0.25, "n": 8}}, {"step": 3, "loss": 1.0}]
    assert accuracy_lines(records) == []
    records.append({"step": 9, "eval": {"greedy": 0.75, "n": 8}})
    assert accuracy_lines(records) == ["held-out greedy: 0.250 before, 0.750 after"]
