"""The command line: ``megatron-vespo train CONFIG [key=value ...]`` and its siblings, a file each.

Exit codes: 0 done, 1 the run failed, 2 the input cannot be used, 75 stopped early as asked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_vespo.cli import (
    budget,
    compare,
    convert,
    doctor,
    eval,
    launch,
    ledger,
    plan,
    prepare_data,
    report,
    train,
)
from megatron_vespo.config.load import ConfigError

COMMANDS = (train, eval, launch, plan, doctor, report, ledger, compare, budget, convert, prepare_data)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parsed(arguments)
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


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand anywhere: argparse alone takes those that come after an option for unknown words."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words = getattr(options, "words", getattr(options, "overrides", None))
    unknown = [word for word in rest if words is None or word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if words is not None:
        words += rest
    return options


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it again, and what is under way is being ended
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-vespo", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
