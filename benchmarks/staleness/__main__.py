"""``python -m benchmarks.staleness``: run the cells that are not done, then write docs/study.md from all that are.

    python -m benchmarks.staleness --suite small             under 20 minutes on two cores
    python -m benchmarks.staleness --suite full              hours; killed and started again it goes on
    python -m benchmarks.staleness --suite full --only 'vespo.*-n8-'    the cells whose name matches
    python -m benchmarks.staleness --suite full --results runs/mine.jsonl    from the beginning, not from what is there
    python -m benchmarks.staleness --suite full --report     the page alone

A cell that is done is a line of the results: benchmarks/staleness/cells.jsonl for the full suite, which the repository
keeps, so that the study goes on where its last session stopped. Model, runs and logs lie under runs/study.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.staleness.cell import RESULT
from benchmarks.staleness.grid import SUITES, Cell
from benchmarks.staleness.page import write_page
from benchmarks.staleness.results import read_outcomes
from benchmarks.staleness.task import make_model

PAGES = {"small": Path("docs/study_small.md"), "full": Path("docs/study.md")}
RESULTS = {"small": Path("runs/study/small.jsonl"), "full": Path("benchmarks/staleness/cells.jsonl")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="small")
    parser.add_argument("--root", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, help="the cells that are done, a line each")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a core each")
    parser.add_argument("--only", default="", help="regular expression on the cells' names")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()

    cells, results = SUITES[options.suite](), options.results or RESULTS[options.suite]
    if not options.report:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        make_model(options.root / "model")
        done = read_outcomes(results)
        run_all(
            options.root, results, [c for c in cells if re.search(options.only, c.name) and c not in done], options.jobs
        )
    outcomes = read_outcomes(results)
    found = [outcomes[cell] for cell in cells if cell in outcomes]
    write_page(PAGES[options.suite], options.suite, found, left=len(cells) - len(found))
    print(f"{PAGES[options.suite]}: {len(found)} of {len(cells)} cells")
    return 0


def run_all(root: Path, results: Path, cells: Sequence[Cell], jobs: int) -> None:
    """Each in a process of its own. One that fails is told, with its log, and left for the next start."""
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}

    def run(cell: Cell) -> int:
        log = root / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.staleness.cell", str(root), cell.name]
        with log.open("w") as file:
            return subprocess.run(command, env=environment, stdout=file, stderr=file).returncode

    results.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as threads:
        cell_of = {threads.submit(run, cell): cell for cell in cells}
        for count, future in enumerate(as_completed(cell_of), start=1):
            name, code = cell_of[future].name, future.result()
            if code == 0:
                with results.open("a") as file:
                    file.write((root / "cells" / name / RESULT).read_text())
            told = "done" if code == 0 else f"FAILED ({code}), see {root / 'logs' / name}.log"
            left = (time.monotonic() - started) / count * (len(cells) - count)
            print(f"{count}/{len(cells)}  {name}  {told}  about {left / 60:.0f} min left", flush=True)


if __name__ == "__main__":
    sys.exit(main())
