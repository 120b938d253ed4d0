"""``megatron-vespo budget --k3 X --length T | --run RUN_DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError, load_config, parse_override


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("budget", help="what an objective keeps of its signal under a per-token mismatch")
    parser.add_argument("--k3", type=float, help="nats a token, such as the metric k3_engine of a run")
    parser.add_argument(
        "--run", type=Path, dest="run_dir", metavar="RUN_DIR", help="instead: a run whose stored rollouts tell it"
    )
    parser.add_argument("--length", type=int, nargs="+", default=[], help="tokens in a response")
    parser.add_argument("--objective", help="one that weighs whole responses (default: that of --run, or vespo)")
    parser.add_argument(
        "--params", nargs="*", default=[], metavar="key=value", help="of the objective, such as cap=2.0"
    )
    parser.set_defaults(run=_budget)


def _budget(options: argparse.Namespace) -> int:
    from megatron_vespo.objectives.budget import budget_table
    from megatron_vespo.observe.run_budget import run_budget_table

    params = dict(parse_override(text) for text in options.params)
    if (options.k3 is None) == (options.run_dir is None):
        raise ConfigError("give either --k3, a mismatch in nats a token, or --run, the directory of a run that had one")
    if options.run_dir is None and not options.length:
        raise ConfigError("--length is missing: the budget of --k3 depends on the tokens in a response")
    try:
        if options.run_dir is None:
            print(budget_table(options.objective or "vespo", options.k3, options.length, **params))
            return 0
        config, name = load_config(options.run_dir / "config.resolved.yaml").run, options.objective
        if not config.knows_old_policy:
            raise ConfigError(
                f"{options.run_dir}: with train.old_logprobs = engine a run does not know its engine's mismatch; give "
                "a run with exact, or --k3"
            )
        if not name:
            name, params = config.objective.name, config.objective.params | params
        print(run_budget_table(options.run_dir, name, params, options.length))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return 0
