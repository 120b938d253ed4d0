"""``megatron-vespo ledger RUN_DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "ledger",
        help="account for every prompt and sample of a run: asked = trained + dropped + open",
        description="Reads RUN_DIR/ledger.sqlite, of a run under way or dead. Exit code 1: it does not balance.",
    )
    parser.add_argument("run_dir", type=Path, help="the directory of a run")
    parser.add_argument("--all", action="store_true", help="a row for every step, not only for the newest")
    parser.set_defaults(run=_ledger)


def _ledger(options: argparse.Namespace) -> int:
    from megatron_vespo.samples.accounting import NoLedger, account, account_table

    try:
        result = account(options.run_dir)
    except NoLedger as error:
        raise ConfigError(str(error)) from None
    print(account_table(result, all_steps=options.all))
    return 0 if result.balances else 1
