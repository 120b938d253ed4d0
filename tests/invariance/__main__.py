"""Measures the whole matrix and writes the page; ``make invariance`` calls it.

Exits with 1, after writing the page, where a cell is not below the tolerance.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from invariance.cases import whole_matrix
from invariance.matrix import measure
from invariance.table import failures, page

TIMEOUT_S = 7200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m invariance", description=__doc__)
    parser.add_argument("page", type=Path, help="the file to write: docs/invariance.md")
    path = parser.parse_args().page
    start = time.perf_counter()
    found = measure(whole_matrix(), TIMEOUT_S)
    path.write_text(page(found, time.perf_counter() - start))
    if failing := failures(found):
        raise SystemExit("\n".join(failing))


if __name__ == "__main__":
    main()
