"""What ``launch`` prints, for Slurm and for Kubernetes; the nodes that a config needs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_vespo.cli import main
from megatron_vespo.config.load import load_config
from megatron_vespo.launch.allocation import check_allocation, nodes_needed
from megatron_vespo.launch.doctor import Finding, examine

ROOT = Path(__file__).parents[1]
MOE = ROOT / "model_configs/qwen3_30b_a3b_vespo.yaml"
ASYNC = ROOT / "model_configs/qwen3_30b_a3b_vespo_async.yaml"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["launch", *map(str, arguments), "--dry-run"]) == 0
    return capsys.readouterr().out


def test_the_script_asks_for_the_nodes_that_the_config_fills(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, MOE, "train.mini_batches=16")
    assert "#SBATCH --nodes=8\n" in script  # 32 ranks and 16 engines on 2 GPUs each
    assert script.count("train_job ") >= 1 and f"train_job {MOE} train.mini_batches=16" in script


def test_trainer_and_rollout_nodes_may_be_two_parts_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, ASYNC, "--heterogeneous")
    before, after = script.split("#SBATCH hetjob\n")
    assert "#SBATCH --nodes=2\n" in before and "#SBATCH --nodes=6\n" in after
    assert "\nTRAINER_NODES=2\n" in after


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("flags", [[], ["--grid", str(ROOT / "model_configs/grids/paper.yaml")]])
def test_shellcheck_passes_what_is_printed(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    script = printed(capsys, MOE, *flags)
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_passes_every_script() -> None:
    scripts = [*(ROOT / "launch/slurm").glob("*.sh"), *(ROOT / "tests/slurm").glob("*.sh")]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert len(scripts) == 7 and done.returncode == 0, done.stdout


def test_a_grid_is_a_task_for_every_point(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, MOE, "--grid", ROOT / "model_configs/grids/paper.yaml")
    assert "#SBATCH --array=0-19\n" in script  # 4 objectives x 5 N
    settings = "objective.name=gspo train.mini_batches=16 train.prompts_per_step=4096 train.steps=94"
    assert (
        "qwen3_30b_a3b_vespo/name=gspo-mini_batches=16-prompts_per_step=4096-steps=94 POINT=(" + settings + ")"
        in script
    )
    script = printed(capsys, ASYNC, "--grid", ROOT / "model_configs/grids/objectives.yaml")
    assert "#SBATCH --array=0-6\n" in script and "POINT=(objective.name=bapo)" in script


def launched_with(folder: Path, launcher: str, **environment: str) -> tuple[int, list[str], str]:
    """(exit code, arguments of train_job, what was said) of a launcher inside a job."""
    library = folder / "launch/slurm/job.sh"
    library.parent.mkdir(parents=True)
    library.write_text(f"source {ROOT}/launch/slurm/job.sh\ntrain_job() {{ printf '%s\\n' \"$@\"; }}\n")
    known = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "VESPO_HOME": str(folder)}
    command = ["bash", str(ROOT / "launch/slurm" / launcher), "optimizer.lr=1"]
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("launcher", ["moe_30b_vespo.sh", "dense_8b_vespo.sh"])
def test_n_keeps_an_update_at_256_prompts_and_the_run_at_1500_updates(tmp_path: Path, launcher: str) -> None:
    blocks = yaml.safe_load((ROOT / "model_configs/grids/paper.yaml").read_text())
    for block in blocks:
        n, prompts, steps = (block[f"train.{name}"] for name in ("mini_batches", "prompts_per_step", "steps"))
        assert prompts / n == 256 and 1500 <= steps * n < 1500 + n
        settings = [f"train.mini_batches={n}", f"train.prompts_per_step={prompts}", f"train.steps={steps}"]
        code, (_, *passed), _ = launched_with(tmp_path / str(n), launcher, N=str(n))
        assert (code, passed) == (0, [*settings, "optimizer.lr=1"])
    code, (config, *passed), _ = launched_with(tmp_path / "none", launcher)
    assert passed == ["optimizer.lr=1"]
    run = load_config(ROOT / config).run
    assert (run.train.mini_batches, run.train.prompts_per_step, run.train.steps) == (8, 2048, 188)
    code, passed, said = launched_with(tmp_path / "wrong", launcher, N="many")
    assert (code, passed) == (2, []) and "refused: N=many: how many mini-batches" in said


def test_a_point_that_is_no_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("- train.mini_batchs: [1, 2]\n")
    assert main(["launch", str(MOE), "--grid", str(grid), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"{grid}: train.mini_batchs=1" in said and "train.mini_batches" in said


def test_an_engine_that_fits_no_node_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(MOE), "rollout.engine_args={tp-size: 16}", "--dry-run"]) == 2
    assert "an engine on 16 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        ([], 8),
        (["rollout.engines=17"], 9),
        (["rollout.engine_args={tp-size: 8}"], 20),
        (["cluster.rollout_nodes=5"], 9),
    ],
)
def test_nodes_needed(settings: list[str], nodes: int) -> None:
    assert nodes_needed(load_config(MOE, settings).run) == nodes


def test_too_small_an_allocation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "7")
    with pytest.raises(ValueError, match=r"qwen3_30b_a3b_vespo.yaml:\d+: cluster.nodes = 4: .* 8 nodes.*--nodes=8"):
        check_allocation(load_config(MOE), on_gpus=True)
    monkeypatch.setenv("SLURM_HET_SIZE", "2")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES_HET_GROUP_0", "4")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES_HET_GROUP_1", "4")
    check_allocation(load_config(MOE), on_gpus=True)


def test_the_doctor_refuses_a_run_without_its_model() -> None:
    findings = {finding.check: finding for finding in examine(load_config(MOE))}
    assert findings["run"].refused and "model.path" in findings["run"].text
    assert not findings["ports"].refused and isinstance(findings["versions"], Finding)


def test_the_kubernetes_manifest_has_the_nodes_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(ASYNC), "--kubernetes", "registry/image:1"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest["metadata"]["name"] == "qwen3-30b-a3b-vespo-async"
    assert "cluster.address=auto" in manifest["spec"]["entrypoint"]
    cluster = manifest["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert {name: group["replicas"] for name, group in groups.items()} == {"trainer": 2, "rollout": 6}
    for name, group in groups.items():
        assert group["rayStartParams"]["resources"] == f'"{{\\"{name}\\": 1}}"'  # as KubeRay wants it quoted
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry/image:1" and container["resources"]["limits"]["nvidia.com/gpu"] == 8


@pytest.mark.parametrize(
    ("shape", "tensor", "a_token"),
    [
        ("Qwen3-30B-A3B-Base", 1, 48 * 2 * 4 * 128 * 2),  # layers x (K, V) x heads x width x bfloat16
        ("Qwen3-30B-A3B-Base", 8, 48 * 2 * 1 * 128 * 2),  # more ranks than heads: each has one
        ("DeepSeek-V3", 16, 61 * (512 + 64) * 2),  # the latent and the rotary key, whole on every rank
    ],
)
def test_kv_cache_of_a_token(shape: str, tensor: int, a_token: int) -> None:
    from transformers import AutoConfig

    from megatron_vespo.policy.memory import kv_bytes_per_token

    assert kv_bytes_per_token(AutoConfig.from_pretrained(ROOT / "model_configs/shapes" / shape), tensor) == a_token


def test_plan_says_whether_it_fits_and_what_it_would_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(MOE), f"model.shape={ROOT}/model_configs/shapes/Qwen3-30B-A3B-Base"]) == 0
    said = capsys.readouterr().out
    assert "trainer      37.3 of 68 usable GiB of 80: fits" in said
    assert "KV cache 0.75 GiB for 16384 tokens" in said and "would choose tensor 1" in said
    shape = f"model.shape={ROOT}/model_configs/shapes/Qwen3-30B-A3B-Base"
    assert main(["plan", str(MOE), shape, "--gpu-memory", "24"]) == 0
    said = capsys.readouterr().out
    assert said.count("does not fit") == 2 and "would choose tensor 4, pipeline 1, context 1, data 8, expert 32" in said
