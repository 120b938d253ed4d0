"""``python -m megatron_vespo.rollout.reference``: serve one checkpoint until killed. Flags are named as SGLang's."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
import uvicorn

from megatron_vespo.platform.sglang_server import KEY_VARIABLE
from megatron_vespo.rollout.reference.generator import Generator
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.precision import Fp8
from megatron_vespo.rollout.reference.server import build_app


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_vespo.rollout.reference", description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True, help="HF-format checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=("fp8",), help="fp8: weights rounded in blocks of 128 x 128")
    parser.add_argument("--fp8-activations", action="store_true", help="with --quantization fp8, round inputs as well")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8_e4m3"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="threads of a matrix product")
    parser.add_argument("--max-running-requests", type=int, default=512, help="sequences decoded together")
    parser.add_argument("--context-length", type=int, help="default: the model's max_position_embeddings")
    parser.add_argument("--random-seed", type=int, default=0, help="for requests that bring no sampling_seed")
    parser.add_argument("--weight-version", type=int, default=0, help="version of the weights in --model-path")
    args = parser.parse_args()
    if args.fp8_activations and args.quantization is None:
        parser.error("--fp8-activations needs --quantization fp8")
    key = os.environ.pop(KEY_VARIABLE, None)
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"reference engine: --host {args.host} wants a key in {KEY_VARIABLE}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(args.threads)
    # Denormal probabilities slow a CPU many times over.
    torch.set_flush_denormal(True)
    dtype = getattr(torch, args.dtype)
    fp8 = Fp8(args.quantization == "fp8", args.fp8_activations, args.kv_cache_dtype == "fp8_e4m3")
    try:
        model = ReferenceModel(args.model_path, dtype, args.context_length, fp8)
    except (ValueError, OSError) as error:
        print(f"reference engine: {error}", file=sys.stderr)
        return 2
    generator = Generator(model, args.weight_version, args.max_running_requests)
    generator.start()
    app = build_app(generator, dtype, args.random_seed, key)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
