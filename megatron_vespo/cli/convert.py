"""``megatron-vespo convert to-megatron | to-hf | verify``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_vespo.cli.commands import Commands

DESCRIPTION = "convert an HF folder to Megatron's distributed checkpoint and back, and prove it"


def add_parser(commands: Commands) -> None:
    convert = commands.add_parser("convert", help=DESCRIPTION, description=DESCRIPTION)
    verbs = convert.add_subparsers(dest="verb", required=True)

    to_megatron = _verb(verbs, "to-megatron", "an HF folder to a distributed checkpoint", _to_megatron)
    to_megatron.add_argument("hf", type=Path, metavar="HF_DIR", help="config.json, safetensors, tokenizer")
    to_megatron.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    to_megatron.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of all weights (default: each one's own; fp8 becomes bf16)"
    )

    to_hf = _verb(verbs, "to-hf", "a distributed checkpoint, converted or of a run, to an HF folder", _to_hf)
    to_hf.add_argument("megatron", type=Path, metavar="MEGATRON_DIR", help="such as runs/NAME/checkpoints/step_000100")
    to_hf.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    to_hf.add_argument(
        "--precision",
        choices=("bf16", "fp32", "fp8"),
        help="of all weights (default: each one's own); fp8: linear weights in blocks of 128 x 128, the rest in bf16",
    )
    to_hf.add_argument(
        "--hf",
        type=Path,
        metavar="HF_DIR",
        help="where config and tokenizer come from (default: what the conversion kept, or model.path of the run)",
    )

    verify = _verb(verbs, "verify", "prove that two folders hold one model; exit code 1 if they do not", _verify)
    verify.add_argument("hf", type=Path, metavar="HF_DIR")
    verify.add_argument("other", type=Path, metavar="MEGATRON_DIR|HF_DIR2")
    verify.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (default: five of our own)")
    verify.add_argument("--no-logits", action="store_true", help="names and bytes only; needs no memory for the model")
    verify.add_argument(
        "--rounding",
        action="store_true",
        help="the second folder may hold tensors in another precision (fp32, bf16, fp8 blocks), within its rounding",
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of logits, over the largest (default: 1e-4; with --rounding they are shown and not judged)",
    )
    verify.add_argument("--report", type=Path, metavar="FILE", help="default: verify.json in the second folder")


def _verb(
    verbs: Commands,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one a core, at most 8)")

    def run_or_tell(options: argparse.Namespace) -> int:
        from megatron_vespo.config.load import ConfigError
        from megatron_vespo.weights.mapping import WeightsError

        try:
            return run(options)
        except WeightsError as error:
            raise ConfigError(str(error)) from None
        except OSError as error:
            if error.filename is None:
                raise
            raise ConfigError(f"{error.filename}: {error.strerror}") from None

    parser.set_defaults(run=run_or_tell)
    return parser


def _to_megatron(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_vespo.convert.convert import to_megatron

    console = Console(stderr=True)
    report = to_megatron(
        options.hf, options.out, precision=options.precision, workers=_workers(options), console=console
    )
    print(report)
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_vespo.convert.convert import to_hf

    report = to_hf(
        options.megatron,
        options.out,
        hf=options.hf,
        precision=options.precision,
        workers=_workers(options),
        console=Console(stderr=True),
    )
    print(report)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_vespo.convert.parity import read_prompts
    from megatron_vespo.convert.verify import verify

    verdict = verify(
        options.hf,
        options.other,
        prompts=read_prompts(options.prompts) if options.prompts else None,
        logits=not options.no_logits,
        rounding=options.rounding,
        tolerance=options.tolerance,
        workers=_workers(options),
        console=Console(stderr=True),
    )
    report = options.report or options.other / "verify.json"
    verdict.write(report)
    verdict.show(Console())
    print(report)
    return 0 if verdict.proven else 1


def _workers(options: argparse.Namespace) -> int:
    from megatron_vespo.config.load import ConfigError
    from megatron_vespo.convert.stream import DEFAULT_WORKERS

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers = {options.workers}: give at least 1")
    return options.workers or DEFAULT_WORKERS
