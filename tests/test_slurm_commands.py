"""`convert.sh` and `eval.sh` on a real Slurm, with the tiny model: `make test-slurm`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hf_checkpoints import differences
from safetensors.torch import load_file, save_file
from slurm.cluster import SlurmCluster, missing
from slurm.tiny_job import Job, TinyJob
from tiny_run import make_checkpoint, wait_until, write_problems

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
K, PROBLEMS = 4, 12


class Command(Job):
    """A job of ``launcher``; its logs go below ``folder``, and not into the repository."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, launcher: str, *words: str | Path, after: Job | None = None
    ) -> None:
        flags = [f"--dependency=afterok:{after.number}"] if after else []
        command = [*flags, f"launch/slurm/{launcher}", *map(str, words)]
        super().__init__(cluster, folder / "job-%j.log", *command, RUN_DIR=str(folder / "jobs"))
        self.log = folder / f"job-{self.number}.log"

    def exit_code(self) -> int:
        code, _, number = self.ended()["ExitCode"].partition(":")
        assert number == "0", f"ended by signal {number}: {self.said()}"
        return int(code)


def test_a_model_comes_back_from_megatron_and_verify_tells_another(cluster: SlurmCluster, job_folder: Path) -> None:
    hf, megatron, back = make_checkpoint(job_folder / "hf"), job_folder / "megatron", job_folder / "back"
    other = shutil.copytree(hf, job_folder / "other")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    there = Command(cluster, job_folder, "convert.sh", "to-megatron", hf, megatron)
    home = Command(cluster, job_folder, "convert.sh", "to-hf", megatron, back, after=there)
    proof = Command(cluster, job_folder, "convert.sh", "verify", hf, megatron, after=there)
    report = job_folder / "wrong.json"
    verify_another = ["verify", other, megatron, "--no-logits", "--report", report]
    wrong = Command(cluster, job_folder, "convert.sh", *verify_another, after=there)
    for job in (there, home, proof):
        assert job.exit_code() == 0, job.said()
    assert differences(load_file(back / "model.safetensors"), hf) == []
    assert "proven" in proof.said()
    assert wrong.exit_code() == 1 and "model.norm.weight" in wrong.said()


def test_what_is_refused_ends_the_job_and_its_log_says_why(cluster: SlurmCluster, job_folder: Path) -> None:
    absent, out = job_folder / "absent", job_folder / "out"
    jobs = [
        Command(cluster, job_folder, "convert.sh", "to-megatron", absent, out),
        Command(cluster, job_folder, "eval.sh", absent, "--data", job_folder / "sums.jsonl", "--out", out),
    ]
    for job in jobs:
        assert job.exit_code() == 2, job.said()
        assert "error: " in job.said() and str(absent) in job.said()


def responses(path: Path) -> list[dict[str, Any]]:
    """Whole lines."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_an_evaluation_queued_again_in_the_middle_asks_for_what_is_missing(
    cluster: SlurmCluster, job_folder: Path
) -> None:
    model, out = make_checkpoint(job_folder / "model"), job_folder / "out"
    data = write_problems(job_folder / "sums.jsonl", PROBLEMS)
    settings = [
        *("rollout.engine=reference", "rollout.precision=fp32", "data.max_prompt_tokens=32", "reward.workers=1"),
        *("reward.name=tiny_run.distinct_characters", "rollout.in_flight=8"),
        # Few at a time, so that there is a middle.
        "rollout.engine_args={max-running-requests: 2}",
    ]
    words = ["--data", data, "--k", str(K), "--max-tokens", "96", "--out", out]
    job = Command(cluster, job_folder, "eval.sh", model, *words, *settings)
    file = out / "model" / "sums.responses.jsonl"
    wait_until(lambda: len(responses(file)) >= 3, 120, "the first responses")
    cluster.ask("scontrol", "requeue", job.number)
    wait_until(lambda: job.starts() == 2, 30, "the job to be queued again")
    wait_until(lambda: not cluster.job_processes(), 60, "the first start to end")
    assert "every process of the run has been ended" in job.said(), "the command was not told"
    before = file.read_text()
    assert len(responses(file)) < K * PROBLEMS, "it had ended already"

    assert job.exit_code() == 0, job.said()
    rows = responses(file)
    assert file.read_text().startswith(before[: before.rfind("\n") + 1]), "what was there was written anew"
    assert len(rows) == len({(row["problem"], row["index"]) for row in rows}) == K * PROBLEMS
    table = (out / "table.md").read_text().strip()
    assert f"| model | sums | {PROBLEMS} | {K} |" in table and table in job.said()


def test_a_run_of_a_job_is_evaluated_by_another(cluster: SlurmCluster, trained: TinyJob, job_folder: Path) -> None:
    job = Command(cluster, job_folder, "eval.sh", trained.run, "--k", "2")
    assert job.exit_code() == 0, job.said()
    assert "| run/step_000003 | heldout | 2 | 2 |" in (trained.run / "eval" / "table.md").read_text()
