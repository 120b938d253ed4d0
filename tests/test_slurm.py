"""The launchers on a real Slurm: `make test-slurm`. Nothing is timed; a run is endless until the test lets it end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from slurm.cluster import SlurmCluster, missing
from slurm.tiny_job import ROOT, TinyJob
from tiny_run import records, wait_until

from megatron_vespo.cli import main

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
LAUNCHERS = sorted(path.name for path in (ROOT / "launch/slurm").glob("*.sh") if path.name != "job.sh")
ENDLESS = {"steps": 100_000, "prompts_per_step": 8, "mini_batches": 2, "tokens_per_micro_batch": 256}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_slurm_accepts_every_launcher(cluster: SlurmCluster, launcher: str) -> None:
    assert "to start at" in cluster.ask("sbatch", "--test-only", f"launch/slurm/{launcher}", "x", cwd=ROOT)


def test_trainers_and_engines_take_their_nodes_and_nothing_is_left(cluster: SlurmCluster, trained: TinyJob) -> None:
    assert trained.steps() == [1, 2, 3]
    wait_until(lambda: not cluster.job_processes(), 60, "every process of the job to end")
    logs = sorted(path.name for path in (trained.run / "logs").glob("job-*/*.log"))
    assert logs == ["await.log", "doctor.log", "driver.log", "ray-0.log", "ray-1.log"]


def test_a_grid_runs_as_an_array_and_is_reported_side_by_side(cluster: SlurmCluster, job_folder: Path) -> None:
    grid = job_folder / "grid.yaml"
    grid.write_text("- {objective.name: [vespo, gspo]}\n")
    # Without GPUs a node has room for the engine too, and the script would ask for one more.
    job = TinyJob(cluster, job_folder, 1, "--nodes=1", launch_flags=["--grid", str(grid)])
    for task in ("_0", "_1"):
        assert job.ended(part=task)["JobState"] == "COMPLETED", job.said()
    runs = [job.run / "name=vespo", job.run / "name=gspo"]
    assert all([record["step"] for record in records(run) if "loss" in record] == [1, 2, 3] for run in runs)
    assert main(["report", *map(str, runs), "--out", str(job_folder)]) == 0
    with (job_folder / "runs.csv").open() as file:
        assert [row["objective"] for row in csv.DictReader(file)] == ["vespo", "gspo"]


def test_trainers_and_engines_as_two_parts_of_a_job(cluster: SlurmCluster, job_folder: Path) -> None:
    apart = {"nodes": 1, "rollout_nodes": 1, "ranks_per_node": 1}
    job = TinyJob(cluster, job_folder, 2, launch_flags=["--heterogeneous"], cluster=apart)
    assert job.ended(part="+0")["JobState"] == "COMPLETED", job.said()
    assert job.steps() == [1, 2, 3]
    nodes = {cluster.job(job.number + part)["NodeList"] for part in ("+0", "+1")}
    assert len(nodes) == 2, "both parts on one node"
    assert len(list(job.run.glob("logs/job-*/ray-*.log"))) == 2


def test_a_job_with_too_few_nodes_is_refused_before_ray_starts(cluster: SlurmCluster, job_folder: Path) -> None:
    job = TinyJob(cluster, job_folder, 2, cluster={"nodes": 3, "ranks_per_node": 1})
    assert job.ended()["ExitCode"] == "2:0", job.said()
    assert "tiny.yaml:" in job.said() and "cluster.nodes = 3" in job.said() and "--nodes=3" in job.said()
    assert not list(job.run.glob("logs/job-*/ray-*"))


def test_at_the_time_limit_the_run_stops_with_a_checkpoint_and_goes_on(cluster: SlurmCluster, job_folder: Path) -> None:
    job = TinyJob(cluster, job_folder, 2, "--time=4", "--signal=B:USR1@190", train=ENDLESS, checkpoint={"every": 0})
    wait_until(lambda: job.starts() == 2, 280, "the job to be queued again")
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")  # the limit struck; it need not again
    last = job.steps()[-1]
    saved = [path.name for path in job.run.glob("checkpoints/step_*")]
    assert saved == [f"step_{last:06d}"], "not where it stopped"
    job.end_after(last + 2)
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    assert job.steps() == list(range(1, last + 3)), "a step is missing, or was made twice"


def test_a_run_whose_node_is_cut_off_goes_on_elsewhere(cluster: SlurmCluster, job_folder: Path) -> None:
    job = TinyJob(cluster, job_folder, 2, train=ENDLESS)
    wait_until(lambda: len(list(job.run.glob("checkpoints/step_*"))) >= 2, 200, "two checkpoints")
    assert cluster.job(job.number)["NodeList"] == "n[1-2]"
    cluster.cut_off("n2")
    try:
        wait_until(lambda: job.starts() == 2, 200, "the job to be queued again")
        reached = job.steps()[-1]
        job.end_after(reached + 2)
        assert job.ended()["JobState"] == "COMPLETED", job.said()
        assert job.steps() == list(range(1, reached + 3))
        assert "n2" not in cluster.job(job.number)["NodeList"]
    finally:
        cluster.power_off("n2")
        cluster.power_on("n2")


def test_a_crash_loop_is_noticed(cluster: SlurmCluster, job_folder: Path) -> None:
    broken = {"engine": "reference", "precision": "fp32", "engine_args": {"nonsense": 1}}
    job = TinyJob(cluster, job_folder, 1, rollout=broken)
    assert job.ended()["ExitCode"] == "1:0"
    assert job.starts() == 2, job.said()
    assert "crash loop: 2 starts without a new checkpoint" in job.said()


def test_scancel_leaves_nothing(cluster: SlurmCluster, job_folder: Path) -> None:
    job = TinyJob(cluster, job_folder, 1, train=ENDLESS)
    wait_until(lambda: job.steps(), 200, "a step")
    assert cluster.job_processes()
    cluster.ask("scancel", job.number)
    assert job.ended()["JobState"] == "CANCELLED"
    wait_until(lambda: not cluster.job_processes(), 60, "every process of the job to end")
