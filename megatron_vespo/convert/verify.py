"""The proof that two folders hold one model: every tensor by name, its bytes, and what both compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_vespo.convert.convert import check_tied, find_placement, left_out, read_hf_config
from megatron_vespo.convert.files import Scratch, as_bytes
from megatron_vespo.convert.megatron_folder import MegatronReader, is_megatron_folder
from megatron_vespo.convert.parity import Parity, compare_logits
from megatron_vespo.convert.safetensors_folder import HfReader
from megatron_vespo.convert.stream import DEFAULT_WORKERS, Source, TransferBar, bands, in_threads
from megatron_vespo.weights.fp8 import BLOCK, LARGEST, is_block_quantised
from megatron_vespo.weights.mapping import WeightsError

_MOST_PROBLEMS = 20


@dataclass
class Verdict:
    """What a comparison found; ``problems`` is empty where it is proven."""

    first: str
    second: str
    tensors: int = 0
    """In both."""
    bitwise: int = 0
    """Of them, those with the same bytes."""
    rounded: int = 0
    """Those within the rounding that was asked for."""
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line each, which names the tensor and its file."""
    parity: Parity | None = None

    @property
    def proven(self) -> bool:
        return not self.problems and (self.parity is None or self.parity.equal)

    def write(self, file: Path) -> None:
        file.write_text(json.dumps({"proven": self.proven, **asdict(self)}, indent=2) + "\n")

    def show(self, console: Console) -> None:
        table = Table(title=f"{self.first} and {self.second}", title_justify="left", show_header=False)
        table.add_row("tensors in both", f"{self.tensors:,}")
        table.add_row("of which bitwise equal", f"{self.bitwise:,}")
        if self.rounded:
            table.add_row("of which equal up to rounding", f"{self.rounded:,}")
        for note in self.left_out:
            table.add_row("left out", note)
        table.add_row("problems", f"{len(self.problems):,}")
        if self.parity is not None:
            table.add_row("prompts, tokens", f"{self.parity.prompts}, {self.parity.tokens}")
            table.add_row("largest difference of logits", f"{self.parity.largest:.3g} of {self.parity.scale:.3g}")
            table.add_row("same first choice", f"{self.parity.same_choice:.2%}")
            limit = (
                "not judged" if self.parity.tolerance is None else f"at most {self.parity.tolerance:g} of the largest"
            )
            table.add_row("tolerance", limit)
        table.add_row("verdict", "[green]proven[/]" if self.proven else "[red]NOT the same model[/]")
        console.print(table)
        for problem in self.problems[:_MOST_PROBLEMS]:
            console.print(problem, markup=False, soft_wrap=True)
        if len(self.problems) > _MOST_PROBLEMS:
            console.print(f"... and {len(self.problems) - _MOST_PROBLEMS} more")


def verify(
    hf: Path,
    other: Path,
    *,
    prompts: Sequence[str] | None = None,
    logits: bool = True,
    rounding: bool = False,
    tolerance: float | None = None,
    workers: int = DEFAULT_WORKERS,
    console: Console | None = None,
) -> Verdict:
    """Compare an HF folder with a distributed checkpoint or another HF folder.

    ``prompts``: None takes a set of our own. ``rounding``: the second may hold each tensor in another precision, within
    the rounding of that. ``tolerance``: of logits, relative to the largest; None: 1e-4, or not judged under
    ``rounding``. Raises WeightsError for a folder that cannot be read as a model at all.
    """
    console = console or Console(quiet=True)
    verdict = Verdict(str(hf), str(other))
    config = read_hf_config(hf)
    placement = find_placement(config, hf)
    ours = HfReader(hf)
    theirs: MegatronReader | HfReader
    if is_megatron_folder(other):
        theirs = MegatronReader(other, placement)
        verdict.problems += [f"{key}: in {other}, and not in the model" for key in theirs.extra_keys(placement)]
        if ours.is_fp8:
            weight = next(n for n, i in ours.stored.items() if i.dtype == torch.float8_e4m3fn and n in theirs.tensors)
            ours = HfReader(hf, dequantised=theirs.tensors[weight].dtype)
            verdict.left_out.append("scales of fp8 blocks: weights are compared as what values and scales stand for")
        omitted = left_out(ours, config, placement)
        verdict.problems += check_tied(ours, placement)
    else:
        theirs = HfReader(other)
        if ours.is_fp8 and theirs.is_fp8:  # values and scales, bitwise
            ours, theirs = HfReader(hf, dequantised=None), HfReader(other, dequantised=None)
        omitted = {}
    with closing(ours), closing(theirs):
        _compare(ours, theirs, omitted, verdict, rounding=rounding, workers=workers, console=console)
    if logits and not verdict.problems:
        if tolerance is None and not rounding:
            tolerance = 1e-4
        verdict.parity = compare_logits(hf, other, prompts, tolerance)
    return verdict


def _compare(
    ours: HfReader,
    theirs: MegatronReader | HfReader,
    omitted: dict[str, str],
    verdict: Verdict,
    *,
    rounding: bool,
    workers: int,
    console: Console,
) -> None:
    verdict.left_out += sorted(set(omitted.values()))
    both = [name for name in ours.tensors if name in theirs.tensors]
    missing = [name for name in ours.tensors if name not in theirs.tensors and name not in omitted]
    extra = [name for name in theirs.tensors if name not in ours.tensors]
    verdict.problems += [f"{ours.where(name)}: missing in {theirs.folder}" for name in missing]
    verdict.problems += [f"{theirs.where(name)}: not in {ours.folder}" for name in extra]
    comparable = {}
    for name in both:
        a, b = ours.tensors[name], theirs.tensors[name]
        if a.shape != b.shape:
            verdict.problems.append(
                f"{theirs.where(name)}: shape {list(b.shape)}, and {list(a.shape)} in {ours.folder}"
            )
        elif a.dtype != b.dtype and not rounding:
            verdict.problems.append(f"{theirs.where(name)}: {b.dtype}, and {a.dtype} in {ours.folder}")
        else:
            comparable[name] = ours.stored[name].nbytes
    verdict.tensors = len(both)
    scratches = Scratch(), Scratch()
    with TransferBar("comparing", sum(comparable.values()), console) as bar:

        def compare(name: str) -> str:
            result = _differ(name, ours, theirs, scratches, rounding=rounding)
            bar.advance(comparable[name])
            return result

        results = list(in_threads(comparable, compare, workers, bar))
    verdict.bitwise, verdict.rounded = results.count("bitwise"), results.count("rounded")
    verdict.problems += [result for result in results if result not in ("bitwise", "rounded")]


def _differ(name: str, ours: Source, theirs: Source, scratches: tuple[Scratch, Scratch], *, rounding: bool) -> str:
    """bitwise, rounded, or a problem."""
    result, wrong, first, worst = "bitwise", 0, -1, 0.0
    fp8 = theirs.stored_dtype(name) == torch.float8_e4m3fn and is_block_quantised(name)
    try:
        for (row, _, a), (_, _, b) in zip(
            bands(ours, name, scratches[0]), bands(theirs, name, scratches[1]), strict=True
        ):
            same = a.to(b.dtype) if rounding else a
            if torch.equal(as_bytes(same.contiguous()), as_bytes(b.contiguous())):
                result = "rounded" if a.dtype != b.dtype else result
                continue
            difference = (a.float() - b.float()).abs()
            unequal = (same.contiguous().view(b.dtype) != b) | same.isnan() | b.isnan()
            if rounding and fp8:
                result = "rounded"
                unequal = ~(difference <= _half_step(a.float()))
            # Bytes may differ where numbers do not: -0.0 and 0.0.
            count = int(unequal.sum()) or (0 if rounding and fp8 else 1)
            if count:
                wrong += count
                worst = max(worst, float(difference.nan_to_num(float("inf")).max()))
                where = unequal.reshape(len(unequal), -1).any(1).nonzero()
                first = first if first >= 0 else row + (int(where[0]) if len(where) else 0)
    except WeightsError as error:
        return str(error)
    if not wrong:
        return result
    return f"{theirs.where(name)}: {wrong} elements differ, by up to {worst:.3g}, from row {first} on"


def _half_step(weight: torch.Tensor) -> torch.Tensor:
    """How far an element may be off after rounding to e4m3 in its block (scaled to 448) and then to bf16."""
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK)).abs()
    largest = blocks.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    scale = (largest / LARGEST).repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    # Three bits of mantissa, half of the last; below 2**-6 of the scale steps are 2**-9 of it. bf16 has seven.
    return weight.abs() * (2**-4 + 2**-7) + scale * 2**-10 * (1 + 2**-7)
