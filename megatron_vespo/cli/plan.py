"""``megatron-vespo plan CONFIG [--simulate]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError, load_config


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="layout and memory of a run; with --simulate its throughput, idle shares and staleness on any GPUs",
        description="Without --simulate: layout and memory a rank, as train --dry-run. With it, the run's loop is "
        "simulated for every split of the GPUs between engines and trainer, and one is recommended. The rates are "
        "those of finished runs (--from) or stated ones (--rates); docs/simulator.md.",
    )
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that win over the file's; with --simulate rates too"
    )
    parser.add_argument("--simulate", action="store_true", help="predict instead of only laying out")
    parser.add_argument(
        "--from", nargs="+", type=Path, default=[], dest="run_dirs", metavar="RUN_DIR", help="measure the rates there"
    )
    parser.add_argument("--rates", type=Path, dest="rates_file", metavar="FILE", help="YAML of rates and lengths")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of one GPU (default: 80)")
    parser.add_argument("--gpus", type=int, help="to split (default: as many as the config has)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated lengths")
    parser.add_argument("--json", action="store_true", help="all numbers instead of tables")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    ours = [argument for argument in options.overrides if argument.startswith(("rates.", "lengths."))]
    settings = [argument for argument in options.overrides if argument not in ours]
    resolved = load_config(options.config, settings)
    if options.simulate:
        from megatron_vespo.loop.preflight_mode import check_mode
        from megatron_vespo.plan.report import as_json, as_text, simulate_plan

        check_mode(resolved.run)
        page = simulate_plan(
            resolved.run,
            run_dirs=options.run_dirs,
            rates_file=options.rates_file,
            assumptions=ours,
            gpus=options.gpus,
            seed=options.seed,
        )
        print(as_json(page) if options.json else as_text(page))
        return 0
    if ours or options.run_dirs or options.rates_file or options.gpus or options.json:
        raise ConfigError("rates, --from, --gpus and --json belong to a simulation; add --simulate")
    from megatron_vespo.loop.preflight import check_run

    plan = check_run(resolved.run, dry_run=True)
    print(plan.describe())
    from megatron_vespo.plan.fit import fit

    print(fit(resolved.run, plan.hf_config, plan.layout, options.gpu_memory))
    return 0
