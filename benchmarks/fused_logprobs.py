"""Log-probs and their gradients from hidden states: time and peak memory, each implementation in its own process.

    python benchmarks/fused_logprobs.py [--tokens 2048] [--hidden 512] [--vocab 151936] [--dtype float32] [--only ours]

plain   all logits at once (policy/logprobs.py)
ours    policy/fused_logprobs.py
torch   torch.nn.functional.linear_cross_entropy, its chunked path (torch >= 2.13)
liger   liger-kernel's chunked log-probs, those of its fused GRPO and VESPO losses (pip install --no-deps liger-kernel)
cce     Apple's cut-cross-entropy (pip install cut-cross-entropy; needs Triton and so a GPU, even to be imported)

The gradient has a coefficient for each token that is known after the forward pass only, as an objective with sums over
responses needs it. Memory is the peak above the inputs (hidden states and weight); both gradients are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import STEADY_ALLOCATOR, held_bytes, peak_bytes, reset_peak

from megatron_vespo import platform

Implementation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
GIB = 2**30


def plain() -> Implementation:
    from megatron_vespo.policy.logprobs import plain_logprobs

    return lambda hidden, weight, labels: plain_logprobs(hidden, weight, labels, vocab_size=len(weight))[0]


def ours() -> Implementation:
    from megatron_vespo.policy.fused_logprobs import fused_logprobs

    return lambda hidden, weight, labels: fused_logprobs(hidden, weight, labels, vocab_size=len(weight))[0]


def torch_chunked() -> Implementation:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()
    return lambda *inputs: -linear_cross_entropy(*inputs, reduction="none", options=options)


def liger() -> Implementation:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return lambda hidden, weight, labels: LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, labels[None])[0]


def cce() -> Implementation:
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps drops small gradients; off, so that all compute the same.
    return lambda *inputs: -linear_cross_entropy(*inputs, reduction="none", filter_eps=None)


IMPLEMENTATIONS = {"plain": plain, "ours": ours, "torch": torch_chunked, "liger": liger, "cce": cce}


def measure(name: str, tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """In a process of its own: seconds, bytes, and results to compare. Raises what the import or the run raises."""
    implementation = IMPLEMENTATIONS[name]()
    here = platform.current()
    generator = torch.Generator(here.device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=here.device).normal_(generator=generator)

    hidden = normal(tokens, hidden_size).requires_grad_()
    weight = normal(vocab, hidden_size).mul_(2 / hidden_size**0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator, device=here.device)
    coefficients = torch.randn(tokens, generator=generator, device=here.device)
    small = [x[:256].detach().clone().requires_grad_() for x in (hidden, weight)]
    implementation(*small, labels[:256] % 256).sum().backward()  # what is loaded or compiled once

    here.synchronize()
    reset_peak()
    before, start = held_bytes(), time.perf_counter()
    logprobs = implementation(hidden, weight, labels).float()
    here.synchronize()
    middle = time.perf_counter()
    logprobs.backward(coefficients)
    here.synchronize()
    end = time.perf_counter()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "forward_s": middle - start,
        "backward_s": end - middle,
        "bytes": peak_bytes() - before,
        "logprobs": logprobs.tolist(),
        "grad_norms": [hidden.grad.float().norm().item(), weight.grad.float().norm().item()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in-this-process", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if name := options.in_this_process:
        dtype = getattr(torch, options.dtype)
        print(json.dumps(measure(name, options.tokens, options.hidden, options.vocab, dtype)))
        return

    print(
        f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocab}, {options.dtype}, "
        f"{platform.current().name}, {options.threads} thread(s), torch {torch.__version__}"
    )
    print(
        f"{'':8}{'forward s':>10}{'backward s':>11}{'peak GiB':>10}{'d log-prob':>11}{'d gradient':>11}"
        "   (d: largest difference to the first row)"
    )
    first: dict[str, Any] = {}
    for name in options.only:
        command = [sys.executable, __file__, *sys.argv[1:], "--in-this-process", name]
        process = subprocess.run(command, capture_output=True, text=True, env=os.environ | STEADY_ALLOCATOR)
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no message"]
            killed = f"killed by signal {-process.returncode} (out of memory?): " if process.returncode < 0 else ""
            print(f"{name:8}could not run: {killed}{lines[-1]}")
            continue
        found = json.loads(process.stdout.splitlines()[-1])
        first = first or found
        logprobs = max(abs(a - b) for a, b in zip(found["logprobs"], first["logprobs"], strict=True))
        gradients = max(abs(a / b - 1) for a, b in zip(found["grad_norms"], first["grad_norms"], strict=True))
        seconds, reference_seconds = (x["forward_s"] + x["backward_s"] for x in (found, first))
        print(
            f"{name:8}{found['forward_s']:10.2f}{found['backward_s']:11.2f}{found['bytes'] / GIB:10.2f}"
            f"{logprobs:11.1e}{gradients:11.1e}   time x{seconds / reference_seconds:.2f}, "
            f"memory x{found['bytes'] / first['bytes']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
