"""Generation throughput of the rollout engines, on one model, with the same prompts and the same number of new tokens.

    python benchmarks/generation.py [--batch 1 32] [--new-tokens 64] [--engines transformers reference sglang]
                                    [--precision fp32 bf16] [--model FOLDER]

transformers   plain AutoModelForCausalLM.generate on the whole batch, in a process of its own
reference      the reference engine, over HTTP, with log-probs
sglang         SGLang, likewise (`make sglang` on a CPU)

Sampling at temperature 1 from the whole vocabulary; responses never stop early. The first pass warms up, the best of
the others counts. One CPU thread an engine; on a CUDA machine each has the GPU to itself. Without --model: random
weights in the quickstart's shape.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_vespo import platform
from megatron_vespo.quickstart.checkpoint import model_config
from megatron_vespo.rollout import EngineError, GenerateRequest, SamplingParams, launch_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 512
PROMPT_TOKENS = 24


def make_model(folder: Path) -> Path:
    """The quickstart's shape with random weights: 4 layers, 8 experts, top-2."""
    config = model_config(VOCABULARY, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(3, VOCABULARY, (batch, PROMPT_TOKENS)).astype(np.int32)


def by_transformers(folder: Path, precision: str, batch: int, new_tokens: int, repeats: int) -> float:
    """Seconds of the best pass."""
    torch.set_num_threads(1)
    device = platform.current().device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).to(device).eval()
    prompts = torch.from_numpy(make_prompts(batch)).long().to(device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        platform.current().synchronize()
        seconds.append(time.perf_counter() - start)
        assert found.shape[1] == PROMPT_TOKENS + new_tokens
    return min(seconds[1:])


def by_engine(
    kind: str, folder: Path, precision: str, batches: list[int], new_tokens: int, repeats: int
) -> dict[int, float]:
    """Batch -> seconds of the best pass; one engine process for all of them."""
    sampling = SamplingParams(max_tokens=new_tokens, temperature=1.0)
    best: dict[int, float] = {}
    with (
        tempfile.TemporaryDirectory() as logs,
        launch_engine(kind, folder, log_file=Path(logs) / "engine.log", precision=precision) as engine,  # type: ignore[arg-type]
    ):
        for batch in batches:
            seconds = []
            for turn in range(repeats + 1):
                requests = [
                    GenerateRequest(f"{batch}.{turn}.{i}", prompt, sampling, seed=i)
                    for i, prompt in enumerate(make_prompts(batch))
                ]
                start = time.perf_counter()
                found = engine.generate(requests)
                seconds.append(time.perf_counter() - start)
                assert all(len(generation.tokens) == new_tokens for (generation,) in found)
            best[batch] = min(seconds[1:])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=["transformers", "reference", "sglang"])
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--model", type=Path, help="an HF folder (prompts are random tokens)")
    parser.add_argument("--transformers-alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.transformers_alone:
        args = (options.model, options.precision[0], options.transformers_alone, options.new_tokens, options.repeats)
        print(json.dumps(by_transformers(*args)))
        return

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or make_model(Path(scratch) / "model")
        print(f"{options.new_tokens} new tokens a response, {platform.current().name}, best of {options.repeats}")
        print(f"{'':14}{'precision':>10}{'batch':>7}{'tokens/s':>10}{'ratio':>8}")
        for precision in options.precision:
            baseline: dict[int, float] = {}
            for name in options.engines:
                for batch, seconds in times(name, folder, precision, options).items():
                    baseline.setdefault(batch, seconds)
                    rate = batch * options.new_tokens / seconds
                    ratio = baseline[batch] / seconds
                    print(f"{name:14}{precision:>10}{batch:7}{rate:10,.0f}{ratio:8.2f}", flush=True)


def times(name: str, folder: Path, precision: str, options: argparse.Namespace) -> dict[int, float]:
    """Batch -> seconds; {} and a line that says why where the engine cannot run here."""
    if name == "transformers":
        common = ["--model", str(folder), "--precision", precision, "--new-tokens", str(options.new_tokens)]
        common += ["--repeats", str(options.repeats)]
        found = {}
        for batch in options.batch:
            command = [sys.executable, __file__, *common, "--transformers-alone", str(batch)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[batch] = float(process.stdout.splitlines()[-1])
        return found
    try:
        return by_engine(name, folder, precision, options.batch, options.new_tokens, options.repeats)
    except EngineError as error:
        print(f"{name:14}{precision:>10} could not run: {str(error).splitlines()[0]}")
        return {}


if __name__ == "__main__":
    main()
