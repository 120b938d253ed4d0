"""The command line: ``megatron-vespo train CONFIG [key=value ...]`` and its siblings.

Exit codes: 0 done, 1 the run failed, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_vespo.cli_convert import add_parser as add_convert_parser
from megatron_vespo.config.load import ConfigError, load_config, parse_override


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Quiet libraries that would look for a hub, a telemetry server or a terminal.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted; every process of the run has been ended", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-vespo", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a policy")
    train.add_argument("config", type=Path, help="a YAML file, such as model_configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    train.add_argument("--dry-run", action="store_true", help="resolve, check and show the plan; start nothing")
    train.set_defaults(run=_train)

    plan = commands.add_parser(
        "plan",
        help="layout and memory of a run; with --simulate its throughput, idle shares and staleness on any GPUs",
        description="Without --simulate: layout and memory a rank, as train --dry-run. With it, the run's loop is "
        "simulated for every split of the GPUs between engines and trainer, and one is recommended. The rates are "
        "those of finished runs (--from) or stated ones (--rates); docs/simulator.md.",
    )
    plan.add_argument("config", type=Path)
    plan.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that win over the file's; with --simulate rates too"
    )
    plan.add_argument("--simulate", action="store_true", help="predict instead of only laying out")
    plan.add_argument(
        "--from", nargs="+", type=Path, default=[], dest="run_dirs", metavar="RUN_DIR", help="measure the rates there"
    )
    plan.add_argument("--rates", type=Path, dest="rates_file", metavar="FILE", help="YAML of stated rates and lengths")
    plan.add_argument("--gpus", type=int, help="to split (default: as many as the config has)")
    plan.add_argument("--seed", type=int, default=0, help="of the simulated lengths")
    plan.add_argument("--json", action="store_true", help="all numbers instead of tables")
    plan.set_defaults(run=_plan)

    report = commands.add_parser("report", help="write report.html of a run directory")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(run=_report)

    ledger = commands.add_parser(
        "ledger",
        help="account for every prompt and sample of a run: asked = trained + dropped + open",
        description="Reads RUN_DIR/ledger.sqlite, of a run under way or dead. Exit code 1: it does not balance.",
    )
    ledger.add_argument("run_dir", type=Path, help="the directory of a run")
    ledger.add_argument("--all", action="store_true", help="a row for every step, not only for the newest")
    ledger.set_defaults(run=_ledger)

    compare = commands.add_parser(
        "compare",
        help="replay a run's stored rollouts through any set of objectives, side by side",
        description="Replays a run's stored rollouts through any set of objectives, under one aggregation and one "
        "correction: tables here, plots and all numbers in RUN_DIR/compare/. The part from the log-probs needs no "
        "model and takes seconds. The gradients in the space of the parameters run the policy under the run's own "
        "layout: a forward and a backward pass of each mini-batch for each objective (for a searching one another "
        "forward), and in host memory 4 bytes a parameter for each objective, spread over the ranks.",
    )
    compare.add_argument("run_dir", type=Path, help="the directory of a run, with rollouts/ and config.resolved.yaml")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the run's")
    compare.add_argument(
        "--objectives",
        nargs="+",
        default=[],
        metavar="NAME[:key=value,...]",
        help="such as vespo vespo:length_power=1.0 package.module.factory (default: all, the run's own first)",
    )
    compare.add_argument("--steps", nargs="+", default=["newest"], help="numbers of stored steps, or newest (default)")
    compare.add_argument("--aggregation", help="for all objectives (default: the run's)")
    compare.add_argument(
        "--correction", nargs="+", metavar=("NAME", "key=value"), help="for all objectives (default: the run's)"
    )
    compare.add_argument(
        "--checkpoint",
        metavar="PATH|none",
        help="where gradients are taken: a Megatron checkpoint, an HF folder, or none to leave that part out "
        "(default: the run's newest checkpoint, or what it started from)",
    )
    compare.set_defaults(run=_compare)

    budget = commands.add_parser("budget", help="what an objective keeps of its signal under a per-token mismatch")
    budget.add_argument("--k3", type=float, help="nats a token, such as the metric k3_engine of a run")
    budget.add_argument(
        "--run", type=Path, dest="run_dir", metavar="RUN_DIR", help="instead: a run whose stored rollouts tell it"
    )
    budget.add_argument("--length", type=int, nargs="+", default=[], help="tokens in a response")
    budget.add_argument("--objective", help="one that weighs whole responses (default: that of --run, or vespo)")
    budget.add_argument(
        "--params", nargs="*", default=[], metavar="key=value", help="of the objective, such as cap=2.0"
    )
    budget.set_defaults(run=_budget)
    add_convert_parser(commands)
    return parser


def _train(options: argparse.Namespace) -> int:
    resolved = load_config(options.config, options.overrides)
    from megatron_vespo.loop.preflight import check_run

    plan = check_run(resolved.run, dry_run=options.dry_run)
    if options.dry_run:
        print(resolved.to_yaml())
        print(plan.describe())
        return 0

    from megatron_vespo.cluster.ray_cluster import ClusterError
    from megatron_vespo.loop.modes import train
    from megatron_vespo.loop.start import open_run
    from megatron_vespo.policy.checkpoint import CheckpointError
    from megatron_vespo.rewards import RewardError
    from megatron_vespo.rollout.episodes import EpisodeError
    from megatron_vespo.rollout.protocol import EngineError
    from megatron_vespo.samples.dataset import DataError
    from megatron_vespo.samples.disk import DiskFull
    from megatron_vespo.samples.ledger import LedgerError
    from megatron_vespo.weights.sync import SyncError

    try:
        with open_run(resolved) as run:
            train(run)
    except (ConfigError, DataError, RewardError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ClusterError, EngineError, EpisodeError, SyncError, LedgerError, DiskFull) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


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

    print(check_run(resolved.run, dry_run=True).describe())
    return 0


def _report(options: argparse.Namespace) -> int:
    if not (options.run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{options.run_dir}: no metrics.jsonl there; give the directory of a run")
    from megatron_vespo.observe.report import write_report

    print(write_report(options.run_dir))
    return 0


def _ledger(options: argparse.Namespace) -> int:
    from megatron_vespo.samples.accounting import NoLedger, account, account_table

    try:
        result = account(options.run_dir)
    except NoLedger as error:
        raise ConfigError(str(error)) from None
    print(account_table(result, all_steps=options.all))
    return 0 if result.balances else 1


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_vespo.cluster.ray_cluster import ClusterError
    from megatron_vespo.loop.compare import compare

    overrides = list(options.overrides)
    if options.aggregation:
        overrides.append(f"objective.aggregation={options.aggregation}")
    if options.correction:
        name, *params = options.correction
        overrides += [f"objective.correction={name}", "objective.correction_params={}"]
        overrides += [f"objective.correction_params.{param}" for param in params]
    try:
        page = compare(
            options.run_dir,
            objectives=options.objectives,
            steps=options.steps,
            checkpoint=options.checkpoint,
            overrides=overrides,
            console=Console(),
        )
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page)
    return 0


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
        name = options.objective
        if not name:
            objective = load_config(options.run_dir / "config.resolved.yaml").run.objective
            name, params = objective.name, objective.params | params
        print(run_budget_table(options.run_dir, name, params, options.length))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return 0
