"""Measure the whole matrix and write the page: ``python -m invariance docs/invariance.md``, tests/ on the path.

Exits with 1, after writing the page, where a cell is not below the tolerance.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from invariance.cases import whole_matrix
from invariance.matrix import measure
from invariance.table import failures, page

TIMEOUT_S = 7200


def main() -> None:
    start = time.perf_counter()
    found = measure(whole_matrix(), TIMEOUT_S)
    Path(sys.argv[1]).write_text(page(found, time.perf_counter() - start))
    if failing := failures(found):
        raise SystemExit("\n".join(failing))


if __name__ == "__main__":
    main()
