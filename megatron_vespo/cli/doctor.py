"""``megatron-vespo doctor [CONFIG] [key=value ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import load_config


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this node, and a run against it and the allocation, before anything is started",
        description="Checks versions, GPUs, driver, NCCL, ports and disk of this node; with a CONFIG, the run as train "
        "does, its disk space, and its layout against the Slurm allocation. Under srun every node checks itself and "
        "the first the run. Exit code 2 where something is refused.",
    )
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from megatron_vespo.launch.doctor import examine

    resolved = load_config(options.config, options.overrides) if options.config else None
    findings = examine(resolved)
    for finding in findings:
        print(finding)
    return 2 if any(finding.refused for finding in findings) else 0
