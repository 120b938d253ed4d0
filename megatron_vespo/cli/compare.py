"""``megatron-vespo compare RUN_DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_vespo.cli.commands import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="replay a run's stored rollouts through any set of objectives, side by side",
        description="Replays a run's stored rollouts through any set of objectives, under one aggregation and one "
        "correction: tables here, plots and all numbers in RUN_DIR/compare/. The part from the log-probs needs no "
        "model and takes seconds. The gradients in the space of the parameters run the policy under the run's own "
        "layout: a forward and a backward pass of each mini-batch for each objective (for a searching one another "
        "forward), and in host memory 4 bytes a parameter for each objective, spread over the ranks.",
    )
    parser.add_argument("run_dir", type=Path, help="the directory of a run, with rollouts/ and config.resolved.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the run's")
    parser.add_argument(
        "--objectives",
        nargs="+",
        default=[],
        metavar="NAME[:key=value,...]",
        help="such as vespo vespo:length_power=1.0 package.module.factory (default: all, the run's own first)",
    )
    parser.add_argument("--steps", nargs="+", default=["newest"], help="numbers of stored steps, or newest (default)")
    parser.add_argument("--aggregation", help="for all objectives (default: the run's)")
    parser.add_argument(
        "--correction", nargs="+", metavar=("NAME", "key=value"), help="for all objectives (default: the run's)"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PATH|none",
        help="where gradients are taken: a Megatron checkpoint, an HF folder, or none to leave that part out "
        "(default: the run's newest checkpoint, or what it started from)",
    )
    parser.set_defaults(run=_compare)


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
