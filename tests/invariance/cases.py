"""What the matrix varies: objectives, aggregations, corrections and router losses; splits of the model; packings."""

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
    router: str = "none"
    """Of ROUTER_LOSSES: what is added to the objective's loss."""

    @property
    def row(self) -> str:
        """Its row of the table, which holds the worst over aggregations."""
        return " + ".join([self.objective, *(part for part in (self.correction, self.router) if part != "none")])


ROUTER_LOSSES: dict[str, dict[str, float]] = {
    "none": {},
    "router z-loss": dict(router_z_loss=0.3),
    "router balance loss": dict(router_balance_loss=2.0),
}
"""Fields of ModelConfig; so large that they are most of a router's gradient."""

AGGREGATIONS = list(AGGREGATION_PARAMS)
OBJECTIVE_CELLS = [Cell(*pair) for pair in product(OBJECTIVE_CASES, AGGREGATIONS)]
CORRECTION_CELLS = [
    Cell("vespo", AGGREGATIONS[i % len(AGGREGATIONS)], correction)
    for i, correction in enumerate(name for name in CORRECTION_CASES if name != "none")
]
ROUTER_CELLS = [Cell("vespo", "token-mean", router=name) for name in ROUTER_LOSSES if name != "none"]
CELLS: dict[str, list[Cell]] = {
    "dense": OBJECTIVE_CELLS + CORRECTION_CELLS,
    "moe": OBJECTIVE_CELLS + CORRECTION_CELLS + ROUTER_CELLS,
}


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
    work: Work = {}
    for kind, cells in CELLS.items():
        turns = [(cell, PACKINGS[(i + i // len(AGGREGATIONS)) % len(PACKINGS)]) for i, cell in enumerate(cells)]
        for name, split in SPLITS[kind].items():
            work[kind, name] = list(product(cells, PACKINGS)) if split.ranks <= 2 else turns
    return work


def fast_subset() -> Work:
    """Every objective once under every split of one or two ranks, one correction, and for the moe one router loss;
    aggregations and packings take turns."""
    turns = list(product(PACKINGS, AGGREGATIONS))
    work: Work = {}
    keys = [(kind, name) for kind, splits in SPLITS.items() for name, split in splits.items() if split.ranks <= 2]
    for number, key in enumerate(keys):
        passes = [(CORRECTION_CELLS[number % len(CORRECTION_CELLS)], PACKINGS[number % len(PACKINGS)])]
        if key[0] == "moe":
            passes.append((ROUTER_CELLS[number % len(ROUTER_CELLS)], PACKINGS[number % len(PACKINGS)]))
        for i, objective in enumerate(OBJECTIVE_CASES):
            packing, aggregation = turns[(7 * number + i) % len(turns)]  # 7: no objective meets the same pair always
            passes.append((Cell(objective, aggregation), packing))
        work[key] = passes
    return work
