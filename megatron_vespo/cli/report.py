"""``megatron-vespo report RUN_DIR...``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("report", help="write report.html of a run directory, or compare several in runs.html")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="of several runs: folder for runs.html and runs.csv (default: here)")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    for run_dir in options.run_dirs:
        if not (run_dir / "metrics.jsonl").exists():
            raise ConfigError(f"{run_dir}: no metrics.jsonl there; give the directory of a run")
    if len(options.run_dirs) == 1 and options.out is None:
        from megatron_vespo.observe.report import write_report

        print(write_report(options.run_dirs[0]))
        return 0
    from megatron_vespo.observe.several_runs import write_several

    try:
        for path in write_several(options.run_dirs, options.out or Path()):
            print(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 0
