"""The VESPO objective alone, loss and gradient on the log-probs: ours against TRL's on the same numbers.

    python benchmarks/objective.py [--responses 64] [--max-tokens 16384] [--repeats 10]

TRL's rows need it in the same environment (pip install trl datasets); without it they are left out with the reason.
They run TRL's own GRPOTrainer.get_gamma_weights with the lines of its loss around it (-phi A log pi, masked, summed,
over the number of tokens) and none of its metrics. TRL pads responses to rows of one length; ours takes them packed,
and here also padded (one flat row with the padding masked). Ours is float64 inside and makes its metrics in the same
call (moments of W and phi, staleness and engine mismatch apart, k3). TRL is given float32, as in training, and float64.

Loss and gradients must equal TRL's in float64 to 1e-6, or the run fails. Memory is the peak above the inputs; time and
memory are measured in processes of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import STEADY_ALLOCATOR, held_bytes, peak_bytes, reset_peak

MIB = 2**20
ROWS = ["ours packed", "ours padded", "trl float32", "trl float64"]
TOLERANCE = 1e-6


def make_batch(responses: int, max_tokens: int) -> dict[str, torch.Tensor]:
    """Rows padded to the longest: log-probs, old and mask [responses, longest], advantages [responses]."""
    generator = torch.Generator().manual_seed(1)
    lengths = (
        (max_tokens * torch.rand(responses, generator=generator) ** 2).long().clamp(min=16)
    )  # many short, few long
    longest = int(lengths.max())
    old = -torch.rand(responses, longest, generator=generator)
    noise = torch.randn(responses, longest, generator=generator) / lengths[:, None] ** 0.5
    return {
        "old": old,
        "logprobs": old + 0.5 * noise,
        "mask": torch.arange(longest) < lengths[:, None],
        "advantages": torch.randn(responses, generator=generator),
    }


Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""() -> (loss, its gradient on the log-probs of counted tokens, in order)."""


def ours(batch: dict[str, torch.Tensor], packed: bool) -> Step:
    from megatron_vespo.objectives import ObjectiveInputs, build_objective

    mask = batch["mask"]
    responses = len(mask)
    kept = mask if packed else torch.ones_like(mask)
    segments = torch.arange(responses)[:, None].expand_as(mask)[kept]
    old, values, counted = (batch[name][kept] for name in ("old", "logprobs", "mask"))
    objective = build_objective("vespo")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = values.detach().requires_grad_()
        output = objective(
            ObjectiveInputs(
                logprobs=logprobs,
                old_logprobs=old,
                rollout_logprobs=old,
                mask=counted,
                segment_ids=segments,
                advantages=batch["advantages"],
                num_segments=responses,
                total_tokens=float(mask.sum()),
                total_sequences=float(responses),
            )
        )
        output.loss.backward()
        assert logprobs.grad is not None
        return output.loss.detach(), logprobs.grad[counted]

    return step


def trl(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> Step:
    from trl.trainer.grpo_trainer import GRPOTrainer

    old, values, advantages = (batch[name].to(dtype) for name in ("old", "logprobs", "advantages"))
    mask = batch["mask"].to(dtype)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = values.detach().requires_grad_()
        log_ratio = logprobs - old
        phi = GRPOTrainer.get_gamma_weights(
            advantages=advantages[:, None], log_ratio_per_token=log_ratio, mask=mask, importance_sampling_ratio=None
        )
        loss = (-phi * advantages[:, None] * logprobs * mask).sum() / mask.sum()
        loss.backward()
        assert logprobs.grad is not None
        return loss.detach(), logprobs.grad[batch["mask"]]

    return step


def build(row: str, batch: dict[str, torch.Tensor]) -> Step:
    owner, kind = row.split()
    return ours(batch, kind == "packed") if owner == "ours" else trl(batch, getattr(torch, kind))


def measure(row: str, what: str, responses: int, max_tokens: int, repeats: int) -> float:
    """Seconds, or bytes, of one loss and gradient."""
    step = build(row, make_batch(responses, max_tokens))
    step()
    if what == "bytes":
        before = held_bytes()
        reset_peak()
        step()
        return peak_bytes() - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def in_a_process(row: str, what: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", row, what]
    environment = os.environ | (STEADY_ALLOCATOR if what == "bytes" else {})
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def compare(rows: list[str], batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest relative difference of loss and gradient to TRL in float64."""
    results = {row: build(row, batch)() for row in rows}
    loss, gradient = (x.double() for x in results["trl float64"])
    return {
        row: max(float((a - loss).abs() / loss.abs()), float((b - gradient).abs().max() / gradient.abs().max()))
        for row, (a, b) in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        sizes: dict[str, Any] = dict(responses=options.responses, max_tokens=options.max_tokens)
        print(measure(*options.measure, **sizes, repeats=options.repeats))
        return

    batch = make_batch(options.responses, options.max_tokens)
    counted, cells = int(batch["mask"].sum()), batch["mask"].numel()
    print(f"{options.responses} responses, {counted:,} tokens in {cells:,} padded places; VESPO, loss and gradient")
    rows = ROWS
    if importlib.util.find_spec("trl") is None:
        print("trl: not in this environment (pip install trl datasets); its rows are left out, nothing is compared")
        rows = [row for row in ROWS if row.startswith("ours")]
        differences = {}
    else:
        import trl as package

        print(f"trl {package.__version__}, torch {torch.__version__}")
        differences = compare(rows, batch)
    print(f"{'':14}{'ms':>9}{'peak MiB':>10}{'difference':>12}   (to trl float64, of loss and gradient)")
    first: tuple[float, float] | None = None
    for row in rows:
        found = (in_a_process(row, "seconds"), in_a_process(row, "bytes"))
        first = first or found
        ratios = f"   time x{found[0] / first[0]:.2f}, memory x{found[1] / first[1]:.2f}"
        difference = f"{differences[row]:12.1e}" if differences else f"{'':12}"
        print(f"{row:14}{1000 * found[0]:9.2f}{found[1] / MIB:10.1f}{difference}{ratios}", flush=True)
    if any(differences.get(row, 0) > TOLERANCE for row in rows if row.startswith("ours")):
        raise SystemExit(f"ours differs from trl in float64 by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
