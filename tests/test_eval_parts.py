"""What `megatron-vespo eval` is made of, without an engine: sets, checkpoints, responses on disk, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_run import make_checkpoint, write_problems

from megatron_vespo.cli import main
from megatron_vespo.config.evaluation import held_out_sets
from megatron_vespo.config.load import ConfigError, default_config
from megatron_vespo.loop.evaluate_checkpoints import _lots
from megatron_vespo.loop.evaluation_plan import evaluation_config, named_set
from megatron_vespo.loop.responses import Responses, response_seed
from megatron_vespo.loop.subjects import find_subjects
from megatron_vespo.observe.accuracy import Answered, summarise
from megatron_vespo.observe.accuracy_table import Row, markdown, write_table
from megatron_vespo.samples.records import Prompt, Sample

# ---------------------------------------------------------------------------------------------- sets


def sets(**evaluate: Any) -> list[Any]:
    values = {"name": "x", "model": {"path": "m"}, "data": {"train": "t"}, "evaluate": evaluate}
    return held_out_sets(default_config(values).run)


def test_a_set_takes_what_it_lacks_from_its_preset_and_the_section() -> None:
    found = sets(
        sets=[
            {"preset": "aime24"},
            {"preset": "amc23", "samples_per_prompt": 2, "temperature": 0, "path": "a/b.jsonl"},
        ],
        temperature=0.6,
        every=5,
        folder="bench",
        samples_per_prompt=3,
    )
    assert [(s.name, str(s.path), s.samples_per_prompt, s.temperature, s.every) for s in found] == [
        ("aime24", "bench/aime24.jsonl", 32, 0.6, 5),
        ("amc23", "a/b.jsonl", 2, 0, 5),
    ]
    (own,) = sets(sets=[{"path": "x/mine.jsonl", "every": 0, "max_response_tokens": 7}], samples_per_prompt=3)
    assert (own.name, own.samples_per_prompt, own.every, own.max_response_tokens) == ("mine", 3, 0, 7)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "x"}], "needs a path"),
        ([{"preset": "aime26"}], "aime24"),
        ([{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}], "two evaluation sets are called 'x'"),
        ([{"path": "x.jsonl", "name": "data.evaluate"}], "give the set another name"),
        ([{"path": "x.jsonl", "name": "a/b"}], "name"),
    ],
)
def test_sets_that_cannot_be_used_are_refused(entries: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sets(sets=entries)


def test_what_data_may_name() -> None:
    assert named_set("math500") == {"preset": "math500"}
    assert named_set("some/aime25.jsonl") == {"name": "aime25", "path": "some/aime25.jsonl", "preset": "aime25"}
    assert named_set("amc23=x.jsonl") == {"name": "amc23", "path": "x.jsonl", "preset": "amc23"}
    assert named_set("mine=x.jsonl") == {"name": "mine", "path": "x.jsonl"}


# ---------------------------------------------------------------------------------------------- checkpoints


def write_run(folder: Path, **sections: Any) -> Path:
    """A run's directory with an HF export and two checkpoints, as far as finding them looks."""
    folder.mkdir()
    values = {
        "name": "r",
        "model": {"path": "m", "routing_replay": "r3"},
        "data": {"train": "t", "evaluate": str(folder / "heldout.jsonl")},
        "cluster": {"nodes": 4, "rollout_nodes": 2, "address": "gone:1"},
        "rollout": {"urls": ["http://gone"], "temperature": 0.9},
    }
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(values | sections))
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "hf" / "model.safetensors").write_text("w")
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / ".metadata").write_text("")
        (checkpoint / "state.json").write_text(json.dumps({"driver": {}, "model": {}}))
    return folder


def test_checkpoints_are_found_in_a_run_and_out_of_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    plain = tmp_path / "plain"
    (run / "hf").rename(plain)
    assert [s.name for s in find_subjects([run, plain])] == ["run/step_000002", "plain"]
    assert [s.name for s in find_subjects([run], every=True)] == ["run/step_000001", "run/step_000002"]
    (subject,) = find_subjects([run / "checkpoints" / "step_000001"])
    assert (subject.name, subject.run, subject.converted) == ("run/step_000001", run, True)


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint; give an HF folder"):
        find_subjects([tmp_path])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        find_subjects([tmp_path])
    with pytest.raises(ConfigError, match="both would be called 'run/hf'"):
        find_subjects([write_run(tmp_path / "run") / "hf"] * 2)


def test_the_weights_fingerprint_follows_the_files(tmp_path: Path) -> None:
    (subject,) = find_subjects([write_run(tmp_path / "run") / "hf"])
    before = subject.fingerprint()
    assert subject.fingerprint() == before
    os.utime(subject.path / "model.safetensors", (1, 1))
    assert subject.fingerprint() != before


def test_the_runs_own_settings_hold_without_its_machines(tmp_path: Path) -> None:
    subjects = find_subjects([write_run(tmp_path / "run") / "hf"])
    config = evaluation_config(subjects, out=tmp_path / "out", sampling={"samples_per_prompt": 9})
    assert [(s.name, s.samples_per_prompt) for s in held_out_sets(config)] == [("heldout", 9)]
    assert config.model.path == tmp_path / "run" / "hf" and config.directory == tmp_path / "out"
    assert config.rollout.temperature == 0.9 and config.rollout.urls == () and config.model.routing_replay == "none"
    assert (config.cluster.nodes, config.cluster.rollout_nodes, config.cluster.address) == (1, 0, None)
    config = evaluation_config(
        subjects, out=tmp_path, data=["aime24"], overrides=["cluster.address=here:1", "evaluate.folder=x"]
    )
    assert [(s.name, s.samples_per_prompt, str(s.path)) for s in held_out_sets(config)] == [
        ("aime24", 32, "x/aime24.jsonl")
    ]
    assert config.cluster.address == "here:1"


def test_runs_that_ask_or_grade_otherwise_share_no_table(tmp_path: Path) -> None:
    mine = write_run(tmp_path / "mine")
    other = write_run(tmp_path / "other", data={"train": "t", "suffix": " Box it."})
    subjects = find_subjects([mine / "hf", other / "hf"])
    with pytest.raises(ConfigError, match=r"data.suffix = '' and .*other has ' Box it.'; say which with"):
        evaluation_config(subjects, out=tmp_path)
    evaluation_config(subjects, out=tmp_path, overrides=["data.suffix=x"])
    evaluation_config(subjects, out=tmp_path, file=mine / "config.resolved.yaml")


# ---------------------------------------------------------------------------------------------- responses on disk

PROMPTS = [Prompt(f"p{i}", np.array([i], np.int32), f"{i}?", str(i)) for i in range(3)]


def graded(prompt: Prompt, index: int, text: str = "\\boxed{1}") -> tuple[int, Sample]:
    nothing = np.zeros(4, np.float32)
    versions = np.zeros(4, np.int32)
    sample = Sample(f"{index}", prompt, versions, nothing, versions, versions == 0, "stop", text)
    sample.grade = float(prompt.answer == "1")
    return index, sample


def opened(folder: Path, prompts: list[Prompt] = PROMPTS, **settings: Any) -> Responses:
    return Responses(folder, "s", {"temperature": 1.0, **settings}, prompts)


def test_responses_are_there_again_and_a_torn_line_is_not(tmp_path: Path) -> None:
    responses = opened(tmp_path)
    assert len(responses.missing(2)) == 6
    assert [(prompt.id, index) for prompt, index in responses.missing(2)][:4] == [
        ("p0", 0),
        ("p1", 0),
        ("p2", 0),
        ("p0", 1),
    ]
    responses.begin()
    responses.add([graded(PROMPTS[1], 0), graded(PROMPTS[0], 1, "nothing \u2028 boxed")])
    with responses.path.open("a") as file:
        file.write('{"problem": "p2", "index": 0, "pro')
    again = opened(tmp_path)
    assert [(prompt.id, index) for prompt, index in again.missing(2)] == [("p0", 0), ("p2", 0), ("p1", 1), ("p2", 1)]
    again.begin()
    again.add([graded(PROMPTS[2], 0), graded(PROMPTS[0], 0)])
    assert [json.loads(line)["problem"] for line in again.path.read_text().split("\n")[:-1]] == ["p1", "p0", "p2", "p0"]
    assert [problem.responses[0].answer for problem in opened(tmp_path).problems(1)] == ["1"] * 3
    assert opened(tmp_path).missing(1) == [] and len(opened(tmp_path).missing(4)) == 8


def test_responses_made_otherwise_are_not_gone_on_with(tmp_path: Path) -> None:
    responses = opened(tmp_path)
    responses.begin()
    responses.add([graded(PROMPTS[0], 0)])
    with pytest.raises(ConfigError, match=r"temperature = 1.0, now it is 0.6; give another --out"):
        opened(tmp_path, temperature=0.6)
    other = [Prompt("p0", np.array([9], np.int32), "9?", "0"), *PROMPTS[1:]]
    with pytest.raises(ConfigError, match="problem 'p0' was another one then"):
        opened(tmp_path, other)
    assert len(opened(tmp_path, PROMPTS[1:]).missing(1)) == 2  # fewer problems are no harm


def test_a_seed_is_of_one_response() -> None:
    names = [
        (1, "s", "p", 0),
        (2, "s", "p", 0),
        (1, "t", "p", 0),
        (1, "s", "q", 0),
        (1, "s", "p", 1),
        (1, "s", "p1", 0),
    ]
    assert len({response_seed(*name) for name in names}) == len(names)
    assert all(0 <= response_seed(*name) < 1 << 31 for name in names)


def test_lots_have_one_index_and_hold_everything_once() -> None:
    missing = [(prompt, index) for index in range(3) for prompt in PROMPTS if (prompt.id, index) != ("p1", 1)]
    lots = list(_lots(missing, 2))
    assert [([p.id for p in prompts], index) for prompts, index in lots] == [
        (["p0", "p1"], 0),
        (["p2"], 0),
        (["p0", "p2"], 1),
        (["p0", "p1"], 2),
        (["p2"], 2),
    ]


# ---------------------------------------------------------------------------------------------- table, command line


def test_the_table_shows_what_there_is(tmp_path: Path) -> None:
    summary = summarise([[Answered(1.0, "1", 3, "stop"), Answered(0.0, None, 5, "length")]] * 2)
    rows = [Row("m", "/m", "s", 1, summary, 0), Row("n", "/n", "s", 0, summary, 2)]
    lines = markdown(rows).splitlines()
    assert lines[2].startswith("| m | s | 2 of 3 | 2 | 0.500 [") and lines[2].endswith("| 4 | 50.0% | 50.0% |")
    assert any("n on s: the grading of 2 responses failed" in line for line in lines)
    write_table(rows, tmp_path)
    (first, _) = json.loads((tmp_path / "results.json").read_text())
    assert first["summary"]["pass_at"]["2"]["value"] == 1.0 and first["summary"]["average"]["low"] < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no checkpoint; give an HF folder"),
        (["rollout.engine=reference"], "no checkpoint is given"),
        (["model"], "say with --out"),
        (["model", "--out", "out"], "give --data"),
        (["model", "--out", "out", "--data", "gone.jsonl"], "gone.jsonl: no such file"),
        (["model", "--out", "out", "--data", "aime24"], "data/aime24.jsonl: no such file"),
        (["model", "--out", "out", "--data", "p.jsonl"], "data.max_prompt_tokens + max_response_tokens of p = 2048"),
        (["model", "--out", "out", "--data", "p.jsonl", "--k", "0"], "samples_per_prompt = 0"),
        (["model", "--out", "out", "--data", "p.jsonl", "rollout.engin=reference"], "did you mean"),
        (["model", "--out", "out", "--data", "p.jsonl", "data.max_prompt_tokens=1", "--max-tokens", "9"], "raise it"),
        (
            ["model", "--out", "out", "--data", "bad.jsonl", "data.max_prompt_tokens=9", "--max-tokens", "9"],
            "broken JSON",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_vespo.loop.evaluate_checkpoints.ray_cluster", None)
    make_checkpoint(tmp_path / "model")
    write_problems(tmp_path / "p.jsonl", 2)
    (tmp_path / "bad.jsonl").write_text("{nonsense\n")
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_settings_may_stand_behind_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: x\n")
    with pytest.raises(SystemExit):
        main(["train", str(file), "--dry-run", "nonsense"])
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err
    assert main(["train", str(file), "--dry-run", "nonsense=1"]) == 2
    assert "unknown key 'nonsense'" in capsys.readouterr().err
