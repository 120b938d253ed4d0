"""``python -m benchmarks.staleness``: run the cells that are not done, then write docs/study.md from all that are.

    python -m benchmarks.staleness --suite small             under 20 minutes on two cores
    python -m benchmarks.staleness --suite full              hours; killed and started again it goes on
    python -m benchmarks.staleness --suite full --only 'vespo.*-n8-'    the cells whose name matches
    python -m benchmarks.staleness --report                  the page alone

Everything lies under runs/study: the model, a folder a cell (metrics.jsonl, report.html, cell.json when it is done).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.staleness.cell import RESULT
from benchmarks.staleness.grid import SUITES, Cell
from benchmarks.staleness.page import write_page
from benchmarks.staleness.task import make_model

PAGES = {"small": Path("docs/study_small.md"), "full": Path("docs/study.md")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="small")
    parser.add_argument("--root", type=Path, default=Path("runs/study"))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a core each")
    parser.add_argument("--only", default="", help="regular expression on the cells' names")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()

    cells = SUITES[options.suite]()
    if not options.report:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        make_model(options.root / "model")
        todo = [cell for cell in cells if re.search(options.only, cell.name) and not done(options.root, cell)]
        run_all(options.root, todo, options.jobs)
    left = sum(not done(options.root, cell) for cell in cells)
    page = PAGES[options.suite]
    write_page(page, options.suite, options.root, [cell for cell in cells if done(options.root, cell)], left)
    print(f"{page}: {len(cells) - left} of {len(cells)} cells")
    return 0


def done(root: Path, cell: Cell) -> bool:
    return (root / "cells" / cell.name / RESULT).is_file()


def run_all(root: Path, cells: list[Cell], jobs: int) -> None:
    """Each in a process of its own. One that fails is told, with its log, and left for the next start."""
    started, count = time.monotonic(), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}

    def run(cell: Cell) -> tuple[Cell, int]:
        log = root / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.staleness.cell", str(root), cell.name]
        with log.open("w") as file:
            return cell, subprocess.run(command, env=environment, stdout=file, stderr=file).returncode

    with ThreadPoolExecutor(jobs) as threads:
        for future in [threads.submit(run, cell) for cell in cells]:
            cell, code = future.result()
            count += 1
            left = (time.monotonic() - started) / count * (len(cells) - count)
            told = "done" if code == 0 else f"FAILED ({code}), see {root / 'logs' / cell.name}.log"
            print(f"{count}/{len(cells)}  {cell.name}  {told}  about {left / 60:.0f} min left", flush=True)


if __name__ == "__main__":
    sys.exit(main())
