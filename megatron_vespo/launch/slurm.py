"""A Slurm job's script from a run's config; a job array from a grid of settings."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.launch.allocation import nodes_needed

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "launch/slurm/job.sh"
TIME = "24:00:00"
SIGNAL_S = 900
"""Before the time limit: a step must fit into it (docs/slurm.md)."""


def job_script(
    config: RunConfig,
    path: Path,
    overrides: Sequence[str],
    *,
    points: Sequence[Sequence[str]] = (),
    heterogeneous: bool = False,
) -> str:
    """The script of one run, or of an array with a task for each of ``points`` (further overrides). Heterogeneous: the
    rollout nodes are a second part of the job, for which other flags can be given. Raises ConfigError."""
    nodes, apart = nodes_needed(config), config.cluster.rollout_nodes
    if heterogeneous and not apart:
        raise ConfigError(
            "cluster.rollout_nodes = 0: a heterogeneous job has nodes for engines alone; set it, or leave out "
            "--heterogeneous"
        )
    gpus = config.cluster.ranks_per_node
    lines = ["#!/bin/bash", *_header(config.name, config.cluster.nodes if heterogeneous else nodes, gpus)]
    lines += [f"#SBATCH --array=0-{len(points) - 1}"] if points else []
    lines += ["#SBATCH hetjob", *_part(apart, gpus)] if heterogeneous else []
    lines += ["# shellcheck disable=SC2317 # called by traps, inside srun, or not in this job", "set -euo pipefail"]
    lines += [f"cd {shlex.quote(str(Path.cwd()))}", f"# --- {LIBRARY.relative_to(ROOT)}"]
    lines += [line for line in LIBRARY.read_text().splitlines() if not line.startswith("# shellcheck shell=")]
    lines += [f"# --- {path}"]
    if apart:
        lines += [f"TRAINER_NODES={config.cluster.nodes}"]
    arguments = [str(path), *overrides]
    if points:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        for place, point in enumerate(points):
            name = shlex.quote(str(config.directory / point_name(point)))
            lines += [f"  {place}) RUN_DIR={name} POINT=({shlex.join(point)}) ;;"]
        lines += ["esac", f'train_job {shlex.join(arguments)} "${{POINT[@]}}"']
    else:
        lines += [f': "${{RUN_DIR:={shlex.quote(str(config.directory))}}}"', f"train_job {shlex.join(arguments)}"]
    return "\n".join(lines) + "\n"


def _header(name: str, nodes: int, gpus: int) -> list[str]:
    flags = [f"--job-name={name}", f"--time={TIME}", f"--signal=B:USR1@{SIGNAL_S}", "--requeue", "--open-mode=append"]
    return [f"#SBATCH {flag}" for flag in flags] + ["#SBATCH --output=%x-%j.log", *_part(nodes, gpus)]


def _part(nodes: int, gpus: int) -> list[str]:
    flags = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--gpus-per-node={gpus}", "--mem=0", "--exclusive"]
    return [f"#SBATCH {flag}" for flag in flags]


def read_grid(file: Path, config: Path, overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each point: the products of each mapping of the list in ``file``, one after the other. Every point
    is read as a config, so that a wrong one is a ConfigError now and not a failed job later."""
    try:
        blocks = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a readable YAML file ({error})") from None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ConfigError(f"{file}: a grid is a list of mappings from a setting to its value or list of values")
    points = []
    for block in blocks:
        values = [value if isinstance(value, list) else [value] for value in block.values()]
        for chosen in itertools.product(*values):
            points.append([f"{key}={value}" for key, value in zip(block, chosen, strict=True)])
    for point in points:
        try:
            nodes_needed(load_config(config, [*overrides, *point]).run)
        except ConfigError as error:
            raise ConfigError(f"{file}: {' '.join(point)}: {error}") from None
    names = [point_name(point) for point in points]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"{file}: {', '.join(sorted(twice))} comes twice; two runs would share a directory")
    return points


def point_name(point: Sequence[str]) -> str:
    """Name of a run's directory: the last part of each setting with its value."""
    return "-".join(setting.rpartition(".")[2] if "." in setting.partition("=")[0] else setting for setting in point)


def submit(script: str, flags: Sequence[str]) -> str:
    """What sbatch says. Raises ConfigError where it refuses, or is not there."""
    try:
        done = subprocess.run(["sbatch", *flags], input=script, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError("sbatch: not found here; submit from a login node, or look at --dry-run") from None
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip()
