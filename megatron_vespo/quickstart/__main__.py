"""``python -m megatron_vespo.quickstart FOLDER [--seed N]``: make the quickstart's model and problems."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from megatron_vespo.quickstart.checkpoint import MARKER, make_quickstart


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_vespo.quickstart", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the HF-format checkpoint and its problems go")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # So small a model gains little from a second thread, and loses tenfold where threads wait for a busy core.
    torch.set_num_threads(1)
    # Adam's second moments reach denormals, which a CPU computes many times slower.
    torch.set_flush_denormal(True)
    try:
        make_quickstart(arguments.folder, arguments.seed)
    except FileExistsError as error:
        parser.exit(1, f"{error}\n")
    marker = json.loads((arguments.folder / MARKER).read_text())
    warm_up = marker["warm_up"]
    print(
        f"{arguments.folder}: {marker['parameters']:,} parameters, probe accuracy "
        f"{warm_up['greedy_accuracy']:.2f} greedy, {warm_up['sampled_accuracy']:.2f} sampled"
        f" ({warm_up['steps']} warm-up steps, {warm_up['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main()
