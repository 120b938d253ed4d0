"""``megatron-vespo plan``: rates measured in runs or stated, splits of the GPUs, what is printed and what refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_vespo.cli import main
from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.plan.calibrate import calibrate, fit_absolute, fit_squares, measured_outcome
from megatron_vespo.plan.loops import simulate
from megatron_vespo.plan.rates import Rates, load_assumptions
from megatron_vespo.plan.recommend import Candidate, Forecast, recommended, trainer_units
from megatron_vespo.plan.report import Page, simulate_plan
from megatron_vespo.plan.setup import Plant, Schedule, plant_of, replica_step, schedule_of
from megatron_vespo.plan.workload import StatedLengths, groups_of
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.store import batch_file, write_batch

ROOT = Path(__file__).parents[1]
H20 = ROOT / "model_configs" / "rates" / "h20_qwen3_30b_a3b.yaml"

TRUE = Rates(
    decode_step=0.010,
    decode_response=2e-4,
    prefill_token=2e-4,
    reward_batch=0.05,
    reward_response=0.001,
    old_logprobs_pass=0.02,
    old_logprobs_token=1e-5,
    update=0.1,
    train_token=4e-5,
    sync=0.3,
    step=0.04,
    step_response=1e-4,
)
"""What the runs below are made with."""

CONFIG = """\
name: measured
model: {{path: nowhere, dtype: float32}}
rollout: {{engine: reference, precision: fp32, samples_per_prompt: {size}, max_response_tokens: 64}}
train: {{steps: 9, prompts_per_step: {prompts}, mini_batches: {mini_batches}}}
data: {{train: nowhere.jsonl}}
cluster: {{ranks_per_node: 2}}
"""


def make_samples(step: int, prompts: int, size: int, mini_batches: int, rng: np.random.Generator) -> list[Sample]:
    samples = []
    for place in range(prompts):
        prompt = Prompt(f"p{place}", np.arange(rng.integers(8, 24)), "", "")
        update = place * mini_batches // prompts
        for i in range(size):
            n = int(rng.integers(4, 64))
            sampled_by = (step - 1) * mini_batches
            sample = Sample(
                *(f"{step}/train/{prompt.id}/{i}", prompt, np.zeros(n, np.int32), np.zeros(n, np.float32)),
                weight_versions=np.full(n, sampled_by),
                loss_mask=np.ones(n, bool),
                finish_reason="stop",
                trained_version=sampled_by + update,
            )
            samples.append(sample)
    return samples


def make_run(folder: Path, prompts: int, size: int, mini_batches: int, *, spike: int = 0) -> Path:
    """A synchronous run of 9 steps on one engine and two ranks whose phases took what ``TRUE`` says; ``spike``: a step
    in which everything took ten times as long."""
    folder.mkdir()
    (folder / "config.resolved.yaml").write_text(CONFIG.format(prompts=prompts, size=size, mini_batches=mini_batches))
    rng = np.random.default_rng(prompts)
    now, lines = 1000.0, []
    for step in range(1, 10):
        samples = make_samples(step, prompts, size, mini_batches, rng)
        write_batch(batch_file(folder / "rollouts", step), samples)
        responses = [len(s.response_tokens) for s in samples]
        prompted = sum(len(s.prompt.tokens) for s in samples[::size])
        tokens = sum(s.length for s in samples) / 2  # of either rank
        seconds = {
            "rollout": 0.010 * max(responses) + 2e-4 * (sum(responses) + prompted),
            "reward": 0.05 + 0.001 * len(samples),
            "old log-probs": 0.02 * mini_batches + 1e-5 * tokens,
            "train": 0.1 * mini_batches + 4e-5 * tokens,
            "sync": 0.3,
        }
        slower = 10 if step == spike else 1
        seconds = {phase: slower * value for phase, value in seconds.items()}
        now += sum(seconds.values()) + slower * (0.04 + 1e-4 * len(samples))
        lines.append(json.dumps({"step": step, "version": step * mini_batches, "time": now, "seconds": seconds}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "small", 4, 4, 1), make_run(folder / "large", 24, 8, 4, spike=6)


def test_rates_are_those_that_the_runs_had(runs: tuple[Path, Path]) -> None:
    found = calibrate(runs)
    assert found.warnings == [] and found.steps == 14  # of each run, all but two
    for name, value in TRUE.model_dump().items():
        if value is not None:
            assert getattr(found.rates, name) == pytest.approx(value, rel=1e-3), name


def test_a_run_is_predicted_from_others(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found, run_dir = calibrate(runs), make_run(tmp_path / "other", 12, 6, 2)
    config = load_config(run_dir / "config.resolved.yaml").run
    predicted = simulate(plant_of(config), schedule_of(config), found.rates, found.workload, updates=80)
    measured = measured_outcome(run_dir)
    assert predicted.samples_per_s == pytest.approx(measured.samples_per_s, rel=0.03)
    assert predicted.trainer_idle == pytest.approx(measured.trainer_idle, abs=0.03)
    assert predicted.engine_idle == pytest.approx(measured.engine_idle, abs=0.03)
    assert measured.staleness_mean == pytest.approx(0.5, abs=0.05) and measured.staleness_max == 1


def test_one_run_says_what_it_cannot_tell(runs: tuple[Path, Path]) -> None:
    found = calibrate(runs[1:])
    assert any(warning.startswith("train: all steps are about the same size") for warning in found.warnings)
    assert found.rates.update == 0 and found.rates.train_token > TRUE.train_token


def test_an_update_of_another_size_than_those_measured_is_said_to_be_extrapolated(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    found = calibrate(runs)  # updates of 16 and of 48 responses
    for name, shape, warned in (("inside", (12, 6, 2), False), ("large", (24, 8, 1), True), ("small", (2, 4, 1), True)):
        config = load_config(make_run(tmp_path / name, *shape) / "config.resolved.yaml").run
        warning = found.beyond(plant_of(config), schedule_of(config))
        assert (warning is not None) == warned, name


def test_a_run_without_old_passes_says_that_they_are_not_known(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", 8, 4, 2)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]["old log-probs"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    alone = calibrate([run_dir])
    assert (alone.rates.old_logprobs_pass, alone.rates.old_logprobs_token) == (0, 0)
    assert any(warning.startswith("old log-probs: computed in none of these runs") for warning in alone.warnings)
    # Where others have it, it is told by them alone.
    found = calibrate([*runs, run_dir])
    assert found.warnings == [] and found.rates.old_logprobs_pass == pytest.approx(TRUE.old_logprobs_pass, rel=1e-3)


def test_an_asynchronous_run_is_compared_and_not_calibrated_on(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", 8, 4, 2)
    config = run_dir / "config.resolved.yaml"
    config.write_text(config.read_text().replace("train: {steps: 9", "train: {mode: asynchronous, steps: 11"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["seconds"] = {"wait": 1.0, "train": 2.0, "sync": 1.0}
        line["busy/engines"], line["rollouts/dropped_stale"] = 0.75, 8 * line["step"]
        line["time"] = 4.0 * line["step"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="side by side"):
        calibrate([run_dir])
    assert calibrate([*runs, run_dir]).steps == 14
    found = measured_outcome(run_dir)
    assert (found.trainer_idle, found.trainer_sync, found.engine_idle) == pytest.approx((0.25, 0.25, 0.25))
    assert found.samples_per_s == pytest.approx(8) and found.dropped == pytest.approx(0.5)


def test_fits_are_not_moved_by_a_few_bad_steps() -> None:
    rng = np.random.default_rng(0)
    work = np.stack([np.ones(40), rng.uniform(0, 100, 40)], 1)
    seconds = work @ np.array([3.0, 0.2])
    seconds[:9] *= 5
    assert fit_absolute(work, seconds) == pytest.approx([3.0, 0.2], rel=1e-3)
    # No coefficient below 0, where plain least squares would take one.
    assert fit_squares(work, work @ np.array([-3.0, 0.2]))[0] == 0


def test_groups_are_those_of_the_store() -> None:
    rng = np.random.default_rng(0)
    samples = make_samples(3, 5, 4, 1, rng)
    found = groups_of(samples)
    assert [len(group.responses) for group in found] == [4] * 5
    assert sum(group.tokens for group in found) == sum(s.length for s in samples)


# ------------------------------------------------------------------------------------------------------ the config


def test_the_config_says_what_is_simulated() -> None:
    path = ROOT / "model_configs" / "qwen3_30b_a3b_vespo.yaml"
    config = load_config(path).run
    assert plant_of(config) == Plant(engines=16, engine_gpus=2, replicas=8, replica_gpus=4, in_flight=512)
    assert replica_step(config) == 2  # 8 experts' ranks are 2 replicas
    assert schedule_of(config) == Schedule("synchronous", groups=256, size=8, longest=15360, mini_batches=8)
    settings = ["train.mode=asynchronous", "asynchronous.sync_every=4", "asynchronous.max_staleness=7"]
    settings += ["asynchronous.too_stale=drop", "asynchronous.max_open=600"]
    found = schedule_of(load_config(path, settings).run)
    assert (found.sync_every, found.max_staleness, found.too_stale, found.max_open) == (4, 7, "drop", 600)
    assert found.old_passes == "by version"


@pytest.mark.parametrize("mode", ["synchronous", "constant_lag", "asynchronous"])
def test_with_the_engines_own_old_logprobs_no_pass_is_simulated(mode: str) -> None:
    def simulated(*settings: str) -> Page:
        config = load_config(ROOT / "model_configs" / "quickstart.yaml", [f"train.mode={mode}", *settings]).run
        return simulate_plan(config, rates_file=H20, gpus=6)

    exact, engine = simulated("train.mini_batches=1"), simulated("train.mini_batches=1", "train.old_logprobs=engine")
    assert engine.own.schedule.old_passes == "none" != exact.own.schedule.old_passes
    # What the synchronous loop would do is told of the same setting.
    assert {candidate.schedule.old_passes for candidate in engine.references} <= {"none"}
    assert {candidate.schedule.old_passes for candidate in exact.references} <= {"one"}
    assert len(exact.references) == len(engine.references) == (2 if mode == "asynchronous" else 0)


def test_stated_rates_are_read_and_checked(tmp_path: Path) -> None:
    found = load_assumptions(H20, ["rates.sync=7", "lengths.mean=3500"])
    assert (found.rates.sync, found.rates.pause, found.lengths.mean) == (7, 5, 3500)
    assert set(Rates.model_fields) >= set(yaml.safe_load(H20.read_text())["rates"])
    for argument, message in {
        "rates.train_tokens=1": "rates.train_tokens",
        "rates.sync=-1": "greater than or equal to 0",
        "lengths.p95=90000": "95th percentile",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_assumptions(H20, [argument])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_assumptions(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------------------ the choice


def test_the_recommended_split_is_the_balanced_one() -> None:
    """An engine makes 1,000 tokens a second and a trainer GPU trains 3,000: of 32 GPUs 24 belong to the engines."""
    rates = Rates(decode_step=0.032, decode_response=0, max_running=32, train_token=1 / 3000)
    lengths = StatedLengths(mean=200, p95=400, prompt=1)
    plant = Plant(engines=1, engine_gpus=1, replicas=1, replica_gpus=1, in_flight=64)
    schedule = Schedule("asynchronous", 64, 4, 1 << 16, max_staleness=8, too_stale="down_weight", old_passes="none")
    forecast = Forecast(rates, lengths, responses=8000)
    splits = forecast.splits(32, plant, schedule)
    best = recommended(splits)
    assert abs(best.plant.rollout_gpus - 24) <= 1
    assert all(candidate.plant.gpus == 32 for candidate in splits) and len(splits) <= 14
    assert best.outcome.tokens_per_s == pytest.approx(24_000, rel=0.08)
    intervals = forecast.intervals(best.plant, schedule)
    assert [candidate.schedule.sync_every for candidate in intervals] == [1, 2, 4, 8]
    # A sync costs nothing here, so the freshest is the best.
    assert recommended(intervals).schedule.sync_every == 1


def test_the_freshest_of_the_fastest_that_drop_little() -> None:
    lags = {0: np.array([9]), 1: np.array([0, 9]), 2: np.array([0, 0, 9])}

    def candidate(samples: int, lag: int, dropped: float = 0.0) -> Candidate:
        rates = Rates(decode_step=1, decode_response=0, train_token=1)
        schedule = Schedule("synchronous", 1, 1, 10)
        outcome = simulate(Plant(1, 1, 1, 1, 512), schedule, rates, StatedLengths(mean=5, p95=6), updates=1, warmup=0)
        changed = {"seconds": 1.0, "samples": samples, "staleness": lags[lag], "dropped": dropped}
        return Candidate(Plant(1, 1, 1, 1, 512), schedule, type(outcome)(**vars(outcome) | changed), 1)

    slow, fresh, fast, wasteful = (
        *(candidate(900, 0), candidate(995, 1), candidate(1000, 2)),
        candidate(2000, 0, dropped=0.4),
    )
    assert recommended([slow, fresh, fast, wasteful]) is fresh
    with pytest.raises(ValueError, match="no split"):
        recommended([])
    assert list(trainer_units(16, Plant(1, 2, 1, 4, 512), 1)) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------ the command

QUICKSTART = ["plan", "model_configs/quickstart.yaml"]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_tables_from_stated_rates(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["train.mode=asynchronous", "train.prompts_per_step=8", "rates.sync=3"]
    assert main([*QUICKSTART, *settings, "--simulate", "--rates", str(H20), "--gpus", "6"]) == 0
    out = capsys.readouterr().out
    assert out.count("<- recommended") == 2 and "sync 3" in out
    assert " 5 + 1 " in out and " 1 + 5 " in out and "6 shared" in out
    assert "recommended: " in out and "asynchronous.sync_every=" in out


def test_json_and_a_measured_run(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = [*QUICKSTART, "--simulate", "--from", *map(str, runs)]
    assert main([*command, "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert sum(split["recommended"] for split in page["splits"]) == 1
    assert page["gpus"] == 3 and page["rates"]["update"] == pytest.approx(0.1, rel=1e-3)
    assert set(page["runs"]) == {str(run) for run in runs}
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("predicted    measured") == 2 and "rates measured over 14 steps" in out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--simulate"], "give either --from"),
        (["--simulate", "--from", "nowhere"], "no metrics.jsonl"),
        (["--simulate", "--rates", str(H20), "--gpus", "1"], "no split"),
        (["rates.snc=1", "--simulate", "--rates", str(H20)], "rates.snc"),
        (
            ["train.mode=asynchronous", "asynchronous.sync_every=4", "--simulate", "--rates", str(H20)],
            "raise the first",
        ),
        (["--json"], "add --simulate"),
        (["rates.sync=1"], "add --simulate"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICKSTART, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_simulation_it_is_the_dry_run_s_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model_configs/llama32_3b_vespo.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("model        3.21 B") and "memory/rank" in out


def test_the_room_needs_no_torch() -> None:
    code = "import sys, megatron_vespo.plan.report; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
