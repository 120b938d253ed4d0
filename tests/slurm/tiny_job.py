"""Submits the launchers, with the tiny run or any other command, and looks at what became of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tiny_run import make_run, records

from slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


class Job:
    """``sbatch COMMAND``; what it says goes to ``log``."""

    def __init__(self, slurm: SlurmCluster, log: Path, *command: str, **environment: str) -> None:
        self.slurm, self.log = slurm, log
        sbatch = ("sbatch", "--parsable", f"--output={log}", *command)
        self.number = slurm.ask(*sbatch, cwd=ROOT, **ENVIRONMENT, **environment).strip()

    def starts(self) -> int:
        return 1 + int(self.slurm.job(self.number)["Restarts"])

    def ended(self, timeout_s: float = 240, part: str = "") -> dict[str, str]:
        """``part``: of an array ``_0``, of a heterogeneous job ``+0``."""
        return self.slurm.wait_for(self.number + part, ENDED, timeout_s)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else "nothing"


class TinyJob(Job):
    """One job of ``launcher`` on ``nodes`` nodes, everything of it under ``folder``; or, where there are
    ``launch_flags``, of the script that ``megatron-vespo launch`` prints with them."""

    def __init__(
        self,
        slurm: SlurmCluster,
        folder: Path,
        nodes: int,
        *flags: str,
        launcher: str = "moe_30b_vespo.sh",
        launch_flags: Sequence[str] = (),
        **sections: dict[str, Any],
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        defaults = {
            "cluster": {"nodes": nodes, "ranks_per_node": 1},
            "checkpoint": {"every": 1, "export_hf": False},
            "evaluate": {"max_prompts": 2, "samples_per_prompt": 1},
        }
        self.config = make_run(folder, **(defaults | sections))
        environment = {"RAY_OBJECT_STORE_BYTES": str(150 << 20), "MAX_STARTS": "2", "GRACE_S": "15"}
        if launch_flags:
            command = [*flags, self._printed(launch_flags)]
        else:
            command = [*flags, f"--nodes={nodes}", f"launch/slurm/{launcher}", "train.mini_batches=2"]
            environment |= {"CONFIG": str(self.config), "RUN_DIR": str(self.run)}
        super().__init__(slurm, folder / "job.log", *command, **environment)

    def _printed(self, launch_flags: Sequence[str]) -> str:
        command = [sys.executable, "-m", "megatron_vespo", "launch", str(self.config), "--dry-run", *launch_flags]
        script = self.folder / "job.sh"
        script.write_text(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        return str(script)

    def steps(self) -> list[int]:
        return [record["step"] for record in records(self.run) if "loss" in record]

    def end_after(self, steps: int) -> None:
        """From its next start on, the run ends there: a config is read at every start."""
        config = yaml.safe_load(self.config.read_text())
        config["train"]["steps"] = steps
        self.config.write_text(yaml.safe_dump(config))
