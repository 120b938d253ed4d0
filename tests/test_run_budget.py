"""``megatron-vespo budget --run``: the mismatch of stored rollouts, what it predicts, and what the responses had."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import CONFIG
from weighed_samples import log_weights, make_samples

from megatron_vespo.cli import main
from megatron_vespo.observe.run_budget import BudgetRow, budget_rows, measure_mismatch, phi_of
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.store import batch_file, write_batch


def store(run_dir: Path, *batches: list[Sample]) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.resolved.yaml").write_text(CONFIG)
    for step, samples in enumerate(batches, 1):
        write_batch(batch_file(run_dir / "rollouts", step), samples)
    return run_dir


def test_the_mismatch_is_that_of_every_counted_token(tmp_path: Path) -> None:
    first = make_samples([30, 0, 7], engine=0.1, masked=0.3, seed=1)
    second = make_samples([12, 50], engine=0.1, masked=0.3, seed=2)
    second[1].old_logprobs = None
    found = measure_mismatch(store(tmp_path, first, second))
    used = [first[0], first[2], second[0]]
    differences = [
        float(old) - float(mu)
        for s in used
        for old, mu, counts in zip(s.old_logprobs, s.rollout_logprobs, s.loss_mask, strict=True)
        if counts
    ]
    assert found.steps == [1, 2]
    assert sorted(found.differences.tolist()) == pytest.approx(sorted(differences))
    assert found.k3 == pytest.approx(np.mean([math.exp(d) - 1 - d for d in differences]))
    assert sorted(found.lengths.tolist()) == sorted(s.loss_mask.sum() for s in used)
    assert sorted(found.log_w.tolist()) == pytest.approx(sorted(log_weights(s)[1] for s in used))


def test_old_batches_are_left_unread_once_there_are_tokens_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = store(tmp_path, *(make_samples([20], engine=0.1, seed=seed) for seed in range(4)))
    monkeypatch.setattr("megatron_vespo.observe.run_budget.TOKENS_ENOUGH", 30)
    assert measure_mismatch(run_dir).steps == [3, 4]


def by_source(rows: list[BudgetRow]) -> dict[str, list[BudgetRow]]:
    return {source: [r for r in rows if r.source == source] for source in ("normal", "resampled", "measured")}


def test_measured_rows_are_the_responses_of_their_lengths(tmp_path: Path) -> None:
    samples = make_samples([10, 10, 10, 90, 90, 90, 90], engine=0.2)
    mismatch = measure_mismatch(store(tmp_path, samples))
    rows = by_source(budget_rows(mismatch, phi_of("vespo", {})))
    assert [(r.shortest, r.longest, r.responses) for r in rows["measured"]] == [(10, 10, 3), (90, 90, 4)]
    for row in rows["measured"]:
        log_w = [log_weights(s)[1] for s in samples if len(s.response_tokens) == row.length]
        assert (row.mean, row.deviation) == pytest.approx((np.mean(log_w), np.std(log_w)))
        for (c1, c2), found, (low, high) in zip(((2, 3), (3, 2)), row.signs, row.sign_ends, strict=True):
            phi = [math.exp(c1 * x + c2 * (1 - math.exp(x))) for x in log_w]
            assert found.mean_phi == pytest.approx(np.mean(phi))
            assert found.ess == pytest.approx(np.mean(phi) ** 2 / np.mean(np.square(phi)))
            assert low.mean_phi <= found.mean_phi <= high.mean_phi


def test_independent_normal_tokens_are_predicted_as_they_are_measured(tmp_path: Path) -> None:
    """Where the model holds, all three agree: a factor lost in any of them shows."""
    samples = make_samples([20] * 600 + [200] * 600, engine=0.1)
    rows = by_source(budget_rows(measure_mismatch(store(tmp_path, samples)), phi_of("vespo", {})))
    for normal, resampled, measured in zip(*rows.values(), strict=True):
        assert normal.deviation == pytest.approx(0.1 * math.sqrt(normal.length), rel=0.02)
        assert resampled.deviation == pytest.approx(normal.deviation, rel=0.05)
        low, high = measured.deviation_ends
        assert 0.97 * low < normal.deviation < 1.03 * high
        for sign in (0, 1):
            lower, upper = (end.mean_phi for end in measured.sign_ends[sign])
            for predicted in (normal, resampled):
                assert lower - 0.02 < predicted.signs[sign].mean_phi < upper + 0.02


def test_correlation_along_a_response_shows_as_measured_beside_resampled(tmp_path: Path) -> None:
    samples = make_samples([100] * 300, engine=0.0)
    rng = np.random.default_rng(3)
    for sample in samples:  # one shift a response: the tokens are as before, their sum is ten times as wide
        sample.old_logprobs = sample.rollout_logprobs + np.float32(rng.normal(0, 0.05))
    rows = by_source(budget_rows(measure_mismatch(store(tmp_path, samples)), phi_of("vespo", {})))
    (normal,), (resampled,), (measured,) = rows.values()
    assert resampled.deviation == pytest.approx(normal.deviation, rel=0.1)
    assert measured.deviation == pytest.approx(10 * resampled.deviation, rel=0.15)
    assert measured.signs[0].mean_phi < 0.3 < 0.6 < resampled.signs[0].mean_phi


def test_a_mismatch_of_rounding_errors_costs_nothing(tmp_path: Path) -> None:
    rows = budget_rows(measure_mismatch(store(tmp_path, make_samples([40, 41], engine=1e-7))), phi_of("vespo", {}))
    assert all(0 < row.deviation < 1e-4 for row in rows if row.source != "measured")
    assert all(signs.mean_phi == pytest.approx(1, abs=1e-4) and not signs.dead for row in rows for signs in row.signs)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = store(tmp_path / "run", make_samples([20] * 50 + [300] * 50, engine=0.1))
    assert main(["budget", "--run", str(run_dir), "--length", "5000"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("vespo ") and "over 16,000 tokens of 100 responses, step 1" in out[0]
    assert [line.split()[:3] for line in out if " normal" in line] == [
        ["20", "50", "normal"],
        ["300", "50", "normal"],
        ["5000", "none", "normal"],
    ]
    assert [line.split()[0] for line in out[3:8]] == ["20", "resampled", "measured", "from", "to"]
    # An objective that is named brings its own parameters, not the run's.
    name = ["--objective", "importance_sampling", "--params", "cap=1"]
    assert main(["budget", "--run", str(run_dir), *name]) == 0
    assert capsys.readouterr().out.startswith("importance_sampling ")


def test_the_runs_own_parameters_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = store(tmp_path / "run", make_samples([300] * 50, engine=0.1))
    (run_dir / "config.resolved.yaml").write_text(CONFIG.replace("params: {}", "params: {c_pos: [0.0, 0.0]}"))
    assert main(["budget", "--run", str(run_dir)]) == 0
    positive, negative = (float(x) for x in capsys.readouterr().out.splitlines()[3].split()[6:8])
    assert positive == 1 and negative < 0.5
    assert main(["budget", "--run", str(run_dir), "--params", "c_neg=[0.0, 0.0]"]) == 0
    assert capsys.readouterr().out.splitlines()[3].split()[6:8] == ["1.000", "1.000"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--length", "9"], "give either --k3"),
        (["--k3", "1e-4", "--run", "RUN", "--length", "9"], "give either --k3"),
        (["--k3", "1e-4"], "--length is missing"),
        (["--run", "RUN", "--objective", "grpo"], "'grpo' weighs each token by its own ratio"),
        (["--run", "RUN", "--objective", "vespa"], "did you mean 'vespo'"),
        (["--run", "NOWHERE"], "NOWHERE/config.resolved.yaml: cannot be read"),
        (["--run", "EMPTY"], "no stored rollouts"),
        (["--run", "ENGINE"], "ENGINE: with train.old_logprobs = engine a run does not know its engine's mismatch"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    store(tmp_path / "RUN", make_samples([5, 6], engine=0.1))
    store(tmp_path / "EMPTY")
    engine = store(tmp_path / "ENGINE", make_samples([5, 6], engine=0.0))
    (engine / "config.resolved.yaml").write_text(CONFIG.replace("mini_batches: 4", "old_logprobs: engine"))
    places = {name: str(tmp_path / name) for name in ("RUN", "EMPTY", "ENGINE", "NOWHERE")}
    assert main(["budget", *(places.get(argument, argument) for argument in arguments)]) == 2
    assert expected in capsys.readouterr().err
