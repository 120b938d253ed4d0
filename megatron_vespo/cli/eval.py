"""``megatron-vespo eval CHECKPOINT [CHECKPOINT ...] --data FILE|PRESET [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="avg@k, pass@k and maj@k of checkpoints on held-out problems",
        description="Checkpoints answer held-out problems, k times each: avg@k, pass@k and maj@k with intervals, one "
        "table over all checkpoints and sets. Ended in the middle, the same command goes on. docs/evaluation.md.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="CHECKPOINT|key=value",
        help="an HF folder, a Megatron checkpoint (converted once), or the directory of a run (its newest); and "
        "settings, such as rollout.engine=reference, that win over those of the checkpoint's run",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE|NAME=FILE|PRESET",
        help="JSONL of problems, or aime24, aime25, amc23, math500, looked for in evaluate.folder; may be given again "
        "(default: what the checkpoint's run evaluates on)",
    )
    parser.add_argument("--k", type=int, help="responses to each problem (default: the preset's, else the config's)")
    parser.add_argument("--temperature", type=float, help="of sampling; 0: greedy (default: the config's)")
    parser.add_argument("--top-p", type=float, help="nucleus sampling (default: the config's)")
    parser.add_argument("--max-tokens", type=int, help="of a response (default: rollout.max_response_tokens)")
    parser.add_argument("--all", action="store_true", help="every checkpoint of a run's directory, not only the newest")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's YAML (default: the checkpoint's run's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for all that is written (default: RUN_DIR/eval)")
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_vespo.cluster.ray_cluster import ClusterError
    from megatron_vespo.loop.evaluate_checkpoints import evaluate_checkpoints
    from megatron_vespo.loop.evaluation_plan import evaluation_config
    from megatron_vespo.loop.subjects import find_subjects
    from megatron_vespo.observe.accuracy_table import markdown, screen
    from megatron_vespo.rewards import RewardError
    from megatron_vespo.rollout.episodes import EpisodeError
    from megatron_vespo.rollout.protocol import EngineError
    from megatron_vespo.samples.rows import DataError
    from megatron_vespo.weights.mapping import WeightsError

    settings = [word for word in options.words if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in options.words if word not in settings]
    if not paths:
        raise ConfigError("no checkpoint is given; name an HF folder, a Megatron checkpoint, or the directory of a run")
    sampling = {
        "samples_per_prompt": options.k,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_response_tokens": options.max_tokens,
    }
    console = Console()
    try:
        subjects = find_subjects(paths, every=options.all)
        out = options.out or _default_out({subject.run for subject in subjects})
        config = evaluation_config(
            subjects,
            file=options.config,
            data=options.data,
            sampling={name: value for name, value in sampling.items() if value is not None},
            overrides=settings,
            out=out,
        )
        rows = evaluate_checkpoints(subjects, config, Console(stderr=True))
    except (ConfigError, DataError, RewardError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ClusterError, EngineError, EpisodeError) as error:
        print(f"error: {error}\nthe same command goes on from what was answered", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    if console.is_terminal:
        console.print(screen(rows))
    else:
        print(markdown(rows))
    print(out / "table.md")
    return 0


def _default_out(runs: set[Path | None]) -> Path:
    run = next(iter(runs))
    if len(runs) > 1 or run is None:
        raise ConfigError("the checkpoints are not all of one run; say with --out where the results go")
    return run / "eval"
