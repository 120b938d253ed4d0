"""``megatron-vespo compare``: from a run's directory to tables, numbers and a page."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_slots import rank_slots
from test_report import Page
from tiny_run import make_run, records, train

from megatron_vespo.cli import main
from megatron_vespo.config.load import load_config
from megatron_vespo.loop.replay import Weights, find_weights, load_run
from megatron_vespo.objectives.catalog import distinct_objectives
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.store import batch_file, write_batch

HOSTILE = "</pre><script>alert(1)</script> [bold]& 2 < 3"
CONFIG = """\
name: made_up
model: {path: nowhere/model, dtype: float32}
data: {train: nowhere/train.jsonl}
objective: {name: vespo, params: {c_pos: [2.0, 2.5]}, aggregation: token-mean}
rollout: {engine: reference, max_response_tokens: 40}
"""


def made_up_samples(step: int) -> list[Sample]:
    """Two mini-batches of eight, the second two updates staler, its log W about as large as 2."""
    rng = np.random.default_rng(step)
    samples = []
    for i in range(16):
        n, version = int(rng.integers(5, 40)), 10 * step + i // 8
        mu = -rng.exponential(1.0, n).astype(np.float32)
        old = mu + rng.normal(0, 0.01, n).astype(np.float32)
        samples.append(
            Sample(
                *(f"{step}/p{i // 4}/{i % 4}", Prompt(f"p{i // 4}", np.arange(3), "2+2", "4"), np.arange(n), mu),
                weight_versions=np.full(n, 10 * step),
                loss_mask=rng.random(n) < 0.9,
                finish_reason="stop",
                text=HOSTILE,
                reward=float(i % 2),
                advantage=[0.0, 1.5, -0.5, -1.0][i % 4],
                old_logprobs=old,
                train_logprobs=old + rng.normal(0, 0.02 if i < 8 else 0.3, n).astype(np.float32),
                trained_version=version,
            )
        )
    return samples


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory with what ``compare`` reads, without a model."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "made_up.yaml").write_text(CONFIG)
    (folder / "config.resolved.yaml").write_text(load_config(tmp_path / "made_up.yaml").to_yaml())
    for step in (3, 4):
        write_batch(batch_file(folder / "rollouts", step), made_up_samples(step))
    return folder


def compared(run: Path, *arguments: str) -> dict[str, Any]:
    with rank_slots(2):
        assert main(["compare", str(run), *arguments]) == 0
    return json.loads((run / "compare" / "compare.json").read_text())


def vespo_phi(sample: Sample, c_pos: tuple[float, float] = (2.0, 2.5), mu: str = "rollout_logprobs") -> float:
    log_w = float((sample.train_logprobs.astype(float) - getattr(sample, mu).astype(float))[sample.loss_mask].sum())
    c1, c2 = c_pos if sample.advantage >= 0 else (3.0, 2.0)
    return math.exp(c1 * log_w + c2 * (1 - math.exp(log_w)))


def test_all_objectives_by_default_the_runs_own_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(run)
    own, *others = found["whole"]["objectives"]
    assert own == "vespo:c_pos=[2.0,2.5]" == found["own"]
    assert ["vespo", *others] == sorted(distinct_objectives(), key=lambda name: (name != "vespo", name))
    assert "gspo" in others and "gspo_token" not in others  # a second name of the same
    out = capsys.readouterr().out
    for text in (*others, own, "token-mean", "16, of which 12 have A ≠ 0", "from version 40 to 41", "0.5 updates"):
        assert text in out, text
    assert "No gradients in the space of the parameters: model.path = nowhere/model" in out
    assert found["whole"]["in_parameters"] is None


def test_every_response_is_in_the_table_with_what_each_objective_makes_of_it(run: Path) -> None:
    found = compared(run, "--objectives", "vespo", "reinforce", "--steps", "3", "newest", "--checkpoint", "none")
    samples = made_up_samples(3) + made_up_samples(4)
    rows = list(csv.DictReader((run / "compare" / "samples.csv").open()))
    assert [row["id"] for row in rows] == [s.id for s in samples]
    dead = 0
    for row, sample in zip(rows, samples, strict=True):
        assert int(row["tokens"]) == sample.loss_mask.sum() and float(row["reward"]) == sample.reward
        if sample.advantage == 0:
            assert row["phi vespo"] == row["phi reinforce"] == row["thrown_away_by"] == ""
            continue
        phi = vespo_phi(sample, (2.0, 3.0))
        assert float(row["phi vespo"]) == pytest.approx(phi, rel=1e-5) and float(row["phi reinforce"]) == 1.0
        assert row["thrown_away_by"] == ("vespo" if phi < 0.01 else "")
        assert float(row["dispute"]) == pytest.approx(max(phi, 1 / phi) if phi > 0.01 else 100.0, rel=1e-5)
        dead += phi < 0.01
    assert 0 < dead < 12 and found["whole"]["objectives"]["vespo"]["thrown_away"] == pytest.approx(dead / 24)
    assert found["whole"]["objectives"]["reinforce"]["thrown_away"] == 0
    assert [(p["versions"], p["staleness"]) for p in found["mini_batches"]] == [
        *(([30], 0.0), ([31], 1.0), ([40], 0.0), ([41], 1.0)),
    ]
    counts = [p["objectives"]["vespo"]["thrown_away"] * p["counted"] for p in found["mini_batches"]]
    assert sum(counts) == pytest.approx(dead)


def test_one_aggregation_and_one_correction_for_all(run: Path) -> None:
    arguments = ("--aggregation", "seq-mean-token-mean", "--correction", "tis", "level=sequence", "cap=0.95")
    found = compared(run, *arguments, "--objectives", "vespo:c_pos=[2,3],length_power=0.5", "reinforce")
    assert list(found["whole"]["objectives"]) == ["vespo:c_pos=[2,3],length_power=0.5", "reinforce"]
    assert (found["aggregation"], found["correction"]) == ("seq-mean-token-mean", "tis:level=sequence,cap=0.95")
    assert found["own"] is None
    rows = list(csv.DictReader((run / "compare" / "samples.csv").open()))
    squares = 0.0
    for row, sample in zip(rows, made_up_samples(4), strict=True):
        if sample.advantage != 0:
            # On policy the correction is 0.95 already: min(1, cap).
            factor = min(math.exp(float(row["log_w_engine"])), 0.95) / 0.95
            assert float(row["phi reinforce"]) == pytest.approx(factor, rel=1e-6)
            tokens = int(row["tokens"])
            squares += (
                tokens * (0.95 * factor * sample.advantage / tokens / 8) ** 2
            )  # of eight sequences in each update
    assert found["whole"]["in_logprobs"]["norms"][1] == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_the_page_is_self_contained_and_no_response_breaks_it(run: Path) -> None:
    compared(run)
    text = (run / "compare" / "compare.html").read_text()
    page = Page(text)
    assert "http" not in text and "#0102" not in text and ">nan" not in text
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert text.count("&lt;script&gt;") == 8  # the disputed responses
    assert page.count("svg") == 3
    for name in ("importance_sampling", "Cosines in the space of the log-probs", "version 41"):
        assert name in text
    assert "Cosines in the space of the parameters" not in text


def no_rollouts(run: Path) -> list[str]:
    for path in (run / "rollouts").iterdir():
        path.unlink()
    return []


def without_train_logprobs(run: Path) -> list[str]:
    samples = made_up_samples(4)
    for sample in samples[:3]:
        sample.train_logprobs = None
    write_batch(batch_file(run / "rollouts", 4), samples)
    return []


def torn_file(run: Path) -> list[str]:
    batch_file(run / "rollouts", 4).write_bytes(b"torn")
    return []


def checkpoint_of_another_model(run: Path) -> list[str]:
    (run / "state.json").write_text('{"driver": {"version": 3}, "model": {"hidden_size": 64}}')
    model = run / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2}')
    (model / "model.safetensors").write_bytes(b"")
    return [f"model.path={model}", "cluster.ranks_per_node=1", "--checkpoint", str(run)]


@pytest.mark.parametrize(
    "prepare,expected",
    [
        (no_rollouts, "rollouts: no stored rollouts there"),
        (without_train_logprobs, "step_000004.safetensors: 3 of its 16 samples have no train_logprobs"),
        (torn_file, "step_000004.safetensors: not a batch of stored rollouts"),
        (checkpoint_of_another_model, "hidden_size is 64 there and 32 here"),
        (lambda run: ["--steps", "7"], "--steps 7: {run}/rollouts does not have this step; it has 3, 4"),
        (lambda run: ["--steps", "oldest"], "--steps oldest: not the number of a step, nor 'newest'; it has 3, 4"),
        (lambda run: ["--objectives", "grppo"], "unknown objective 'grppo'; did you mean 'grpo'?"),
        (lambda run: ["--objectives", "vespo:power=1"], "its parameters are: c_pos"),
        (lambda run: ["--objectives", "vespo:length_power=2"], "length_power must be in [0, 1]"),
        (lambda run: ["--objectives", "vespo:length_power=[1]"], "--objectives vespo:length_power=[1]: "),
        (lambda run: ["--objectives", "vespo:fast"], "after the colon come parameters, such as vespo:length_power=1.0"),
        (lambda run: ["--objectives", "no.such.factory"], "cannot import 'factory' from 'no.such'"),
        (lambda run: ["--aggregation", "mean"], "objective.aggregation = 'mean'"),
        (lambda run: ["--correction", "tis", "capp=2"], "its parameters are: level"),
        (lambda run: ["train.old_logprobs=engine", "--correction", "tis"], "correction = tis needs the trainer's"),
        (lambda run: ["--checkpoint", "nowhere"], "--checkpoint nowhere: neither a checkpoint (no state.json)"),
    ],
)
def test_bad_input_gets_one_message(run: Path, capsys: pytest.CaptureFixture[str], prepare: Any, expected: str) -> None:
    assert main(["compare", str(run), *prepare(run)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and expected.format(run=run) in err and "Traceback" not in err
    assert not out


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert f"error: {tmp_path}: no config.resolved.yaml there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, one update each, and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_run(folder, checkpoint={"every": 1, "keep": 3}, train={"steps": 3, "mini_batches": 1})
    code, out, err = train(config)
    assert code == 0, out + err
    return folder / "run"


@pytest.mark.slow
def test_the_norm_is_that_of_the_update_that_was_made(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 3 was trained from the weights that the checkpoint of step 2 holds."""
    checkpoint = str(finished / "checkpoints" / "step_000002")
    arguments = ("--steps", "3", "--checkpoint", checkpoint, "--objectives", "vespo", "reinforce", "oapl", "grpo")
    found = compared(finished, *arguments)
    logged = next(r["grad_norm"] for r in records(finished) if r["step"] == 3 and "eval" not in r)
    norms, cosines = (found["whole"]["in_parameters"][key] for key in ("norms", "cosines"))
    assert norms[0] == pytest.approx(logged, rel=1e-4)
    # On policy all are the policy gradient, OAPL's times 2 beta.
    assert norms == pytest.approx([logged, logged, 2e-3 * logged, logged], rel=1e-3)
    assert min(map(min, cosines)) > 1 - 1e-6
    assert found["weights"] == f"{checkpoint}, version 2" and found["weights_staleness"] == 0
    assert "Over all parameters of the policy" in capsys.readouterr().out
    assert "Cosines in the space of the parameters" in (finished / "compare" / "compare.html").read_text()
    files = {"compare.html", "compare.json", "samples.csv", "logs"}
    assert {path.name for path in (finished / "compare").iterdir()} == files


@pytest.mark.slow
def test_stale_weights_and_another_layout(finished: Path) -> None:
    """The newest checkpoint by default; pipeline parallelism in place of the run's expert parallelism."""
    found, other = (
        compared(finished, *layout, "--objectives", "vespo", "grpo", "m2po")
        for layout in ((), ("parallel.pipeline=2",))
    )
    assert found["weights"] == f"{finished}/checkpoints/step_000003, version 3" and found["weights_staleness"] == 1
    ours, theirs = (result["whole"]["in_parameters"] for result in (other, found))
    assert theirs["cosines"][0][1] < 0.99
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert np.allclose(ours["cosines"], theirs["cosines"], atol=1e-5)


@pytest.mark.slow
def test_which_weights_there_are_and_how_many_updates_are_behind_them(finished: Path) -> None:
    config = load_run(finished)
    newest = find_weights(finished, config, None)
    assert isinstance(newest, Weights) and newest.version == 3
    assert newest.checkpoint == finished / "checkpoints" / "step_000003"
    exported = find_weights(finished, config, str(finished / "hf"))
    assert isinstance(exported, Weights) and exported.config.model.path == finished / "hf"
    assert (exported.checkpoint, exported.version) == (None, None)
    for choice, run_dir in ((str(finished.parent / "model"), finished), (None, finished.parent)):
        start = find_weights(run_dir, config, choice)
        assert isinstance(start, Weights) and (start.checkpoint, start.version) == (None, 0)
