"""``megatron-vespo prepare-data LAYOUT FILE ... --out OUT.jsonl``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_vespo.cli.commands import Commands
from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.problems import RewardConfig

SHOWN = 10
"""Lines of each kind that are printed."""


def add_parser(commands: Commands) -> None:
    from megatron_vespo.samples.published import LAYOUTS

    parser = commands.add_parser(
        "prepare-data",
        help="published data sets to the JSONL of a run",
        description="Writes id, problem, answer, source, a row a problem; counts duplicates and dropped rows, and "
        "lists the golds that the reward does not grade correct when they are boxed. Nothing is downloaded.",
    )
    layouts = "; ".join(f"{name}: {layout.what}" for name, layout in LAYOUTS.items())
    parser.add_argument("layout", choices=sorted(LAYOUTS), help=layouts)
    parser.add_argument("files", type=Path, nargs="+", help="parquet or JSONL, as published")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write; it must not be there")
    parser.add_argument("--reward", default="math", help="whose verdict on the golds is asked for (default: math)")
    parser.add_argument("--drop-ungradable", action="store_true", help="leave out the golds that it does not accept")
    parser.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from megatron_vespo.rewards.golds import golds_that_fail
    from megatron_vespo.samples.published import prepare
    from megatron_vespo.samples.rows import DataError

    if options.out.exists():
        raise ConfigError(f"--out {options.out} is there already; remove it, or give another name")
    try:
        prepared = prepare(options.layout, options.files)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if not prepared.rows:
        first = f"; the first: {prepared.refused[0]}" if prepared.refused else ""
        raise ConfigError(f"no row of {options.files[0]} is in the layout {options.layout}{first}")
    failing = golds_that_fail([row["answer"] for row in prepared.rows], RewardConfig(name=options.reward))
    wrong = [f"{prepared.rows[i]['id']}: {prepared.rows[i]['answer']!r} ({why})" for i, why in failing.items()]
    rows = [row for i, row in enumerate(prepared.rows) if not (options.drop_ungradable and i in failing)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    duplicates = prepared.duplicates
    _list(f"{prepared.read} rows read, {len(rows)} written to {options.out}", [])
    _list(
        f"{duplicates.dropped} duplicates dropped, {len(duplicates.conflicts)} of another answer", duplicates.conflicts
    )
    _list(f"{len(prepared.refused)} rows that cannot be used dropped", prepared.refused)
    kept = "dropped" if options.drop_ungradable else "kept"
    _list(f"{len(wrong)} golds that do not grade themselves correct under {options.reward}, {kept}", wrong)
    return 0


def _list(title: str, lines: list[str]) -> None:
    print(title + (":" if lines else ""))
    for line in lines[:SHOWN]:
        print(f"  {line}")
    if len(lines) > SHOWN:
        print(f"  ... and {len(lines) - SHOWN} more")
