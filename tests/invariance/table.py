"""docs/invariance.md from what was found."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
from collections.abc import Iterable
from functools import reduce

from objective_data import OBJECTIVE_CASES

from invariance.cases import AGGREGATIONS, CORRECTION_CELLS, KINDS, PACKINGS, ROUTER_CELLS
from invariance.run import Error, Findings, worse

TOLERANCE = 1e-5
METRICS_ROW = "all metrics"
NORM_ROW = "gradient norm"
TITLES = {"dense": "Dense", "moe": "MoE"}

TEXT = """\
# The invariance matrix

Loss and gradient of a mini-batch do not depend on how it is split. `make invariance` measures this and writes this
page; a part of it is in `make test` (`tests/test_invariance.py`).

**What is varied.** {objectives} objectives (each with its defaults, and the forms that its parameters switch
between), each with {aggregations} aggregations ({names}), each in {packings} packings: one micro-batch a rank, or as
many as a budget of {budget} tokens makes; in the trainer's own order (longest first), or dealt out at random, so that
ranks and micro-batches differ in size and some are empty. {corrections} corrections of the engine mismatch, and for
the MoE the {router} losses of its routers (docs/router_losses.md), with VESPO and one aggregation each. All of it
under every split of two ranks, and under those of four, which combine them, with packings taking turns. Everything
for a dense model (Qwen3, tied embeddings) and an MoE (Qwen3-MoE, 4 experts, top 2) of 4 layers. DP, CP, TP, PP, EP:
data, context, tensor, pipeline, expert parallel; SP: sequence parallelism; VPP: virtual pipeline stages (the
interleaved schedule); ETP: tensor parallelism inside an expert; DO: the distributed optimizer, which leaves each rank
a shard of the gradients.

**What runs.** Each of these is a forward and backward pass of its own: megatron-core's model, schedule and DDP, set
up and driven as `PolicyTrainer` does (`run_micro_batches`, `objective_loss`, `sum_metrics`), float32, gloo.

**The reference.** transformers in float64 on one rank, one sequence at a time, and the papers' formulas in plain
loops (`tests/objective_formulas.py`), differentiated by autograd. It shares no code with the product.

**What a number is.** The worst relative error over aggregations, packings, ranks, and
- the gradient of every tensor of the model, on every rank that holds it or a part of it: largest difference, over the
  whole tensor's largest value. Under every split the ranks together must hold every tensor;
- the loss, over the sum of the absolute shares of its responses (their signs differ).

Row `{metrics_row}`: the sums of every metric of all of these, over the sum or its denominator, whichever is larger;
denominators must be equal. (Here the reference is the objective called once, on the whole mini-batch in float64.) Row
`{norm_row}`: the norm that the optimizer clips by, of one pass a split.

**The mini-batch.** Ten responses of 1 to 14 tokens, some tokens masked, one response without any that counts; sampled
by the model and moved off-policy until tokens lie on both sides of every clip and mask, and none within 1e-5 of one
(`tests/test_invariance.py` checks both). float32 alone, on one rank, is the column `1 rank`.

**What is not covered.** A GPU, NCCL, Transformer Engine; bfloat16; more than four ranks; long sequences;
recomputation and the plain log-prob path (`tests/test_model_parity.py` has these two); the optimizer's update beyond
its gradient norm.

## Result

{cells} cells from {passes} passes; the worst is {worst:.1e} ({where}). **{verdict}**
"""


def page(found: dict[tuple[str, str], Findings], seconds: float) -> str:
    cells, failing = all_cells(found), failures(found)
    limit = f"{TOLERANCE:g}".replace("e-0", "e-")
    worst = max(cells, key=lambda name: math.inf if math.isnan(cells[name].relative) else cells[name].relative)
    text = TEXT.format(
        objectives=len(OBJECTIVE_CASES),
        aggregations=len(AGGREGATIONS),
        names=", ".join(AGGREGATIONS),
        packings=len(PACKINGS),
        budget=min(packing.tokens for packing in PACKINGS),
        corrections=len(CORRECTION_CELLS),
        router=len(ROUTER_CELLS),
        metrics_row=METRICS_ROW,
        norm_row=NORM_ROW,
        cells=len(cells),
        passes=f"{sum(findings.passes for findings in found.values()):,}",
        worst=cells[worst].relative,
        where=worst,
        verdict=f"{len(failing)} are not below {limit}:" if failing else f"Every one is below {limit}.",
    )
    packages = ("megatron-core", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    today = datetime.datetime.now(datetime.UTC).date()
    tables = [f"### {TITLES[kind]}\n\n{table(kind, found)}" for kind in KINDS]
    made = f"`make invariance`, {today}: {seconds:.0f} s on {os.cpu_count()} cores; {versions}.\n"
    return "\n".join([text, *(["".join(f"- {line}\n" for line in failing)] if failing else []), *tables, made])


def table(kind: str, found: dict[tuple[str, str], Findings]) -> str:
    columns = {name: rows_of(findings) for (of_kind, name), findings in found.items() if of_kind == kind}
    names = list(columns)
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    lines = [line(["", *names]), line(["---"] * (len(names) + 1))]
    lines += [line([row, *(number(columns[name][row]) for name in names)]) for row in rows]
    return "".join(lines)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def number(error: Error) -> str:
    text = f"{error.relative:.1e}".replace("e-0", "e-")
    return text if error.relative < TOLERANCE else f"**{text}**"


def rows_of(findings: Findings) -> dict[str, Error]:
    """The cells of one split."""
    cells = {row: worse(error, findings.losses[row]) for row, error in findings.gradients.items()}
    return cells | {METRICS_ROW: reduce(worse, findings.metrics.values()), NORM_ROW: findings.norm}


def all_cells(found: dict[tuple[str, str], Findings]) -> dict[str, Error]:
    """By name."""
    return {
        f"{TITLES[kind]}, {name}, {row}": error
        for (kind, name), findings in found.items()
        for row, error in rows_of(findings).items()
    }


def failures(found: dict[tuple[str, str], Findings]) -> list[str]:
    return [
        f"{name}: {error.relative:.1e} ({error.where})"
        for name, error in all_cells(found).items()
        if not error.relative < TOLERANCE
    ]
