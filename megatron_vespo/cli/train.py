"""``megatron-vespo train CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError, load_config


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("train", help="train a policy")
    parser.add_argument("config", type=Path, help="a YAML file, such as model_configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--dry-run", action="store_true", help="resolve, check and show the plan; start nothing")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    resolved = load_config(options.config, options.overrides)
    from megatron_vespo.loop.preflight import check_run

    plan = check_run(resolved.run, dry_run=options.dry_run)
    if options.dry_run:
        print(resolved.to_yaml())
        print(plan.describe())
        return 0

    from megatron_vespo.cluster.ray_cluster import ClusterError
    from megatron_vespo.loop.attempts import train
    from megatron_vespo.loop.stop import STOPPED, StoppedEarly
    from megatron_vespo.policy.checkpoint_folder import CheckpointError
    from megatron_vespo.rewards import RewardError
    from megatron_vespo.rollout.episodes import EpisodeError
    from megatron_vespo.rollout.protocol import EngineError
    from megatron_vespo.samples.disk import DiskFull
    from megatron_vespo.samples.ledger import LedgerError
    from megatron_vespo.samples.rows import DataError
    from megatron_vespo.samples.store import StoreError
    from megatron_vespo.weights.sync import SyncError

    try:
        train(resolved)
    except StoppedEarly as stopped:
        print(stopped)
        return STOPPED
    except (ConfigError, DataError, RewardError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ClusterError, EngineError, EpisodeError, SyncError, LedgerError, StoreError, DiskFull) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
