"""`megatron-vespo eval` with engines: ended by a kill in the middle, it comes to what the undisturbed one comes to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TESTS, make_checkpoint, make_run, processes_about, records, train, wait_until, write_problems

from megatron_vespo.observe.accuracy import Answered, summarise

pytestmark = pytest.mark.slow

K, PROBLEMS = 4, 6


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_vespo", "eval", *words],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def evaluated(*words: str) -> str:
    process = start(*words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole ones."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def by_response(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["problem"], row["index"]): row for row in lines(path)}


def test_killed_in_the_middle_it_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    data = write_problems(tmp_path / "sums.jsonl", PROBLEMS)
    settings = [
        *("rollout.engine=reference", "rollout.precision=fp32", "data.max_prompt_tokens=32", "reward.workers=1"),
        *("reward.name=tiny_run.distinct_characters", "rollout.in_flight=8"),
        # Few at a time, so that there is a middle.
        "rollout.engine_args={max-running-requests: 2}",
    ]
    words = [str(model), "--data", str(data), "--k", str(K), "--max-tokens", "64", *settings]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    evaluated(*words, "--out", str(undisturbed))

    file = killed / "model" / "sums.responses.jsonl"
    process = start(*words, "--out", str(killed))
    wait_until(lambda: len(lines(file)) >= 3, 120, "the first responses")
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = by_response(file)
    assert len(before) < K * PROBLEMS, "it had ended already"
    wait_until(lambda: not processes_about(str(model)), 60, "its engine to end with it")
    with file.open("a") as torn:
        torn.write('{"problem": "su')

    evaluated(*words, "--out", str(killed))
    after, expected = by_response(file), by_response(undisturbed / "model" / "sums.responses.jsonl")
    assert len(lines(file)) == K * PROBLEMS, "a response was asked for twice"
    assert after == expected and all(after[key] == row for key, row in before.items())
    assert len({row["text"] for row in after.values()}) > K * PROBLEMS // 2, "seeds are alike"
    for name in ("results.json", "table.md", "model/sums.problems.jsonl"):
        mine = (killed / name).read_text()
        assert mine == (undisturbed / name).read_text()

    # More responses later: those that are there are kept, and nothing is started where all are there.
    words[words.index("--k") + 1] = str(K + 1)
    evaluated(*words, "--out", str(killed))
    grown = by_response(file)
    assert len(grown) == (K + 1) * PROBLEMS and all(grown[key] == row for key, row in after.items())
    written = file.stat().st_mtime_ns
    evaluated(*words, "--out", str(killed))
    assert file.stat().st_mtime_ns == written


def test_a_run_evaluates_on_its_sets_and_its_checkpoints_are_evaluated_after(tmp_path: Path) -> None:
    extra = write_problems(tmp_path / "extra.jsonl", 3)
    sets = [
        {"path": str(extra), "samples_per_prompt": 3, "every": 2, "max_response_tokens": 5},
        {"name": "rare", "path": str(extra), "temperature": 0, "samples_per_prompt": 1},
    ]
    config = make_run(
        tmp_path,
        evaluate={"samples_per_prompt": 2, "sets": sets},
        checkpoint={"every": 2},
        reward={"name": "math", "workers": 1},
    )
    code, out, err = train(config)
    assert code == 0, err
    run = tmp_path / "run"
    evaluations = {record["step"]: record for record in records(run) if "eval" in record}
    assert sorted(evaluations) == [0, 2, 3]
    assert {name.partition("/")[0] for name in evaluations[2]["eval"]} == {"extra"}
    last = evaluations[3]["eval"]
    assert {"greedy", "avg@2", "pass@2", "n", "extra/avg@3", "extra/pass@3", "extra/n", "rare/avg@1"} <= set(last)
    assert last["n"] == 4 and last["extra/n"] == 3
    assert "held-out extra/avg@3: " in out
    # What was recorded is what the records of the problems come to.
    for name, k in (("extra", 3), ("data.evaluate", 2)):
        rows = lines(run / "evaluations" / name / "step_000003.jsonl")
        groups = [
            [Answered(*each) for each in zip(r["grades"], r["answers"], r["tokens"], r["finish"], strict=True)]
            for r in rows
        ]
        found = summarise(groups)
        prefix = "" if name == "data.evaluate" else f"{name}/"
        assert last[f"{prefix}avg@{k}"] == found.average.value
        assert evaluations[3]["intervals"][f"{prefix}avg@{k}"] == [found.average.low, found.average.high]
        if name == "extra":
            assert all(tokens <= 5 for row in rows for tokens in row["tokens"])
    page = (run / "report.html").read_text()
    assert "held-out extra/avg@3" in page and "<th>extra</th>" in page

    # Without --data: on what the run evaluates on; each checkpoint is converted, once.
    assert "| run/step_000003 | heldout | 4 | 2 |" in evaluated(str(run), "rollout.engines=1")
    said = evaluated(str(run), "--all")
    assert [said.count(f"| run/step_00000{step} | rare | 3 | 1 |") for step in (2, 3)] == [1, 1]
    assert len(list((run / "eval" / "hf").iterdir())) == 2
    results = json.loads((run / "eval" / "results.json").read_text())
    greedy = {row["checkpoint"]: row["summary"] for row in results if row["held_out"] == "rare"}
    recorded = lines(run / "evaluations" / "rare" / "step_000003.jsonl")
    # Greedy has no chance in it: the converted checkpoint answers as the run's engines did at its end.
    alone = lines(run / "eval" / "run" / "step_000003" / "rare.problems.jsonl")
    assert [row["answers"] for row in alone] == [row["answers"] for row in recorded]
    assert [row["tokens"] for row in alone] == [row["tokens"] for row in recorded]
    assert greedy["run/step_000003"]["average"]["value"] == last["rare/avg@1"]
