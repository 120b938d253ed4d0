"""Runs passes under their splits, all splits of as many ranks in one start, and brings the findings together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from ranks import run_ranks

from invariance.cases import SPLITS, Work
from invariance.data import Reference
from invariance.run import Findings, run_splits


def measure(work: Work, timeout_s: float) -> dict[tuple[str, str], Findings]:
    """(kind, name of the split) -> the worst over its passes and ranks. timeout_s: of all splits of as many ranks.

    Raises AssertionError where the ranks of a split do not hold the whole model, and where there is nothing to compare:
    a gradient that should be zero.
    """
    found: dict[tuple[str, str], Findings] = {}
    with tempfile.TemporaryDirectory() as folder:
        names = {kind: write_reference(kind, work, Path(folder)) for kind in {kind for kind, _ in work}}
        for count in sorted({split.ranks for splits in SPLITS.values() for split in splits.values()}):
            part = {(kind, name): passes for (kind, name), passes in work.items() if SPLITS[kind][name].ranks == count}
            if part:
                for of_rank in run_ranks(run_splits, count, part, Path(folder), timeout_s=timeout_s):
                    for key, findings in of_rank.items():
                        found.setdefault(key, Findings()).add(findings)
    for (kind, name), findings in found.items():
        assert findings.compared == names[kind], (kind, name, findings.compared ^ names[kind])
    return {key: found[key] for key in work}


def write_reference(kind: str, work: Work, folder: Path) -> set[str]:
    """``<kind>.pt``, which run.py reads: the samples, and what each cell must give. Returns all tensors' names."""
    reference = Reference(kind)
    cells = {cell for (of_kind, _), passes in work.items() if of_kind == kind for cell, _ in passes}
    expected = {cell: reference.expected(cell) for cell in cells}
    torch.save((reference.samples, expected), folder / f"{kind}.pt")
    for cell, one in expected.items():
        smallest = min(float(gradient.abs().max()) for gradient in one.gradients.values())
        assert smallest > 1e-7, (kind, cell)  # that is oapl's, which has a factor of 1e-3
    return set(next(iter(expected.values())).gradients)
