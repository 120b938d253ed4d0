"""What the matrix varies: objectives, aggregations and corrections; splits of the model; packings of the mini-batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from objective_data import AGGREGATION_PARAMS, CORRECTION_CASES, OBJECTIVE_CASES

KINDS = ("dense", "moe")
TEMPERATURE = 0.5
"""Low, so that the tiny model is sure of some tokens: DPPO masks by differences of probabilities."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One loss: names of OBJECTIVE_CASES, AGGREGATION_PARAMS and CORRECTION_CASES."""

    objective: str
    aggregation: str
    correction: str = "none"

    @property
    def row(self) -> str:
        """Its row of the table, which holds the worst over aggregations."""
        return self.objective if self.correction == "none" else f"{self.objective} + {self.correction}"


AGGREGATIONS = list(AGGREGATION_PARAMS)
OBJECTIVE_CELLS = [Cell(*pair) for pair in product(OBJECTIVE_CASES, AGGREGATIONS)]
CORRECTION_CELLS = [
    Cell("vespo", AGGREGATIONS[i % len(AGGREGATIONS)], correction)
    for i, correction in enumerate(name for name in CORRECTION_CASES if name != "none")
]
CELLS = OBJECTIVE_CELLS + CORRECTION_CELLS
# Losses of the MoE router belong here too, as cells for the moe alone: they are not part of ObjectiveOutput, so that a
# cell of theirs also says what run.py builds the model with and what data.py adds to the reference.


@dataclass(frozen=True, slots=True)
class Packing:
    """How the mini-batch becomes micro-batches."""

    tokens: int
    """Budget of a micro-batch."""
    shuffled: bool
    """False: the trainer's own plan, longest first. True: as many micro-batches, filled at random, some perhaps not."""


PACKINGS = [Packing(tokens, shuffled) for tokens in (1000, 30) for shuffled in (False, True)]


@dataclass(frozen=True, slots=True)
class Split:
    """How many ranks, and what ParallelLayout is given."""

    ranks: int
    layout: dict[str, Any]
    distributed_optimizer: bool = False


SPLITS: dict[str, dict[str, Split]] = {
    "dense": {
        "1 rank": Split(1, {}),
        "DP2": Split(2, {}),
        "DP2 DO": Split(2, {}, distributed_optimizer=True),
        "CP2": Split(2, dict(context=2)),
        "TP2": Split(2, dict(tensor=2)),
        "TP2 SP": Split(2, dict(tensor=2, sequence=True)),
        "PP2": Split(2, dict(pipeline=2)),
        "PP2 VPP2": Split(2, dict(pipeline=2, virtual_pipeline=2)),
        "DP2 CP2 DO": Split(4, dict(context=2), distributed_optimizer=True),
        "TP2 PP2": Split(4, dict(tensor=2, pipeline=2)),
        "TP2 SP CP2": Split(4, dict(tensor=2, sequence=True, context=2)),
        "DP2 PP2 VPP2": Split(4, dict(pipeline=2, virtual_pipeline=2)),
        "CP4": Split(4, dict(context=4)),
    },
    "moe": {
        "1 rank": Split(1, {}),
        "DP2": Split(2, {}),
        "EP2": Split(2, dict(expert=2)),
        "EP2 DO": Split(2, dict(expert=2), distributed_optimizer=True),
        "ETP2": Split(2, dict(expert_tensor=2)),
        "CP2": Split(2, dict(context=2)),
        "CP2 EP2": Split(2, dict(context=2, expert=2)),
        "TP2 SP": Split(2, dict(tensor=2, sequence=True)),
        "TP2 SP EP2": Split(2, dict(tensor=2, sequence=True, expert=2)),
        "TP2 SP ETP2": Split(2, dict(tensor=2, sequence=True, expert_tensor=2)),
        "PP2": Split(2, dict(pipeline=2)),
        "PP2 VPP2": Split(2, dict(pipeline=2, virtual_pipeline=2)),
        "EP4 DO": Split(4, dict(expert=4), distributed_optimizer=True),
        "DP2 CP2 EP2": Split(4, dict(context=2, expert=2)),
        "TP2 SP PP2 EP2": Split(4, dict(tensor=2, sequence=True, pipeline=2, expert=2)),
        "TP2 SP ETP2 EP2 DO": Split(
            4, dict(tensor=2, sequence=True, expert_tensor=2, expert=2), distributed_optimizer=True
        ),
    },
}
"""What is left of the ranks is DP, of which EP takes a part. DO: distributed optimizer; SP: sequence parallelism."""

Work = dict[tuple[str, str], list[tuple[Cell, Packing]]]
"""(kind, name of the split) -> its forward and backward passes."""


def whole_matrix() -> Work:
    """Every cell in every packing under every split of one or two ranks; under one of four, which combines those, every
    cell once, and packings take turns."""
    turns = [(cell, PACKINGS[(i + i // len(AGGREGATIONS)) % len(PACKINGS)]) for i, cell in enumerate(CELLS)]
    return {
        (kind, name): list(product(CELLS, PACKINGS)) if split.ranks <= 2 else turns
        for kind in KINDS
        for name, split in SPLITS[kind].items()
    }


def fast_subset() -> Work:
    """Every objective once under every split of two ranks, and one correction; aggregations and packings take turns."""
    turns = list(product(PACKINGS, AGGREGATIONS))
    work: Work = {}
    keys = [(kind, name) for kind, splits in SPLITS.items() for name, split in splits.items() if split.ranks <= 2]
    for number, key in enumerate(keys):
        passes = [(CORRECTION_CELLS[number % len(CORRECTION_CELLS)], PACKINGS[number % len(PACKINGS)])]
        for i, objective in enumerate(OBJECTIVE_CASES):
            packing, aggregation = turns[(7 * number + i) % len(turns)]  # 7: no objective meets the same pair always
            passes.append((Cell(objective, aggregation), packing))
        work[key] = passes
    return work
