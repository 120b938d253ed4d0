"""``megatron-vespo launch CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import load_config


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "launch",
        help="submit a run to Slurm, or a grid of runs as a job array; or write a manifest for Kubernetes",
        description="The job's script is made from the config: its nodes are those that trainers and engines fill. It "
        "holds launch/slurm/job.sh, so that the job is the one submitted however long it waits. docs/slurm.md.",
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command; submit nothing")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="YAML list of {key: [values]}: a run for every point")
    parser.add_argument("--heterogeneous", action="store_true", help="nodes of trainers and of engines in two parts")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="FLAG", help="a flag for sbatch, such as --sbatch=--account=x"
    )
    parser.add_argument("--kubernetes", metavar="IMAGE", help="print a KubeRay RayJob with that image instead")
    parser.set_defaults(run=_launch)


def _launch(options: argparse.Namespace) -> int:
    resolved = load_config(options.config, options.overrides)
    if options.kubernetes:
        from megatron_vespo.launch.kubernetes import ray_job

        print(ray_job(resolved.run, options.config, options.overrides, options.kubernetes), end="")
        return 0
    from megatron_vespo.launch.slurm import job_script, read_grid, submit

    points = read_grid(options.grid, options.config, options.overrides) if options.grid else []
    script = job_script(
        resolved.run, options.config, options.overrides, points=points, heterogeneous=options.heterogeneous
    )
    if options.dry_run:
        print(script, end="")
        print(f"# submitted by: {' '.join(['sbatch', *options.sbatch])} < this script")
        return 0
    print(submit(script, options.sbatch))
    return 0
