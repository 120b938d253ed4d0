"""``megatron-vespo report RUN_DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("report", help="write report.html of a run directory")
    parser.add_argument("run_dir", type=Path)
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    if not (options.run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{options.run_dir}: no metrics.jsonl there; give the directory of a run")
    from megatron_vespo.observe.report import write_report

    print(write_report(options.run_dir))
    return 0
