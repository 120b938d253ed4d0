"""The precision an engine computes in: its command-line flags, and what a machine or a checkpoint cannot serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from megatron_vespo import platform
from megatron_vespo.rollout.protocol import EngineError
from megatron_vespo.weights.fp8 import BLOCK

EngineKind = Literal["reference", "sglang"]
Precision = Literal["fp32", "bf16", "fp8", "fp8_kv"]

FLAGS: dict[Precision, dict[str, str]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "quantization": "fp8"},
    "fp8_kv": {"dtype": "bfloat16", "kv-cache-dtype": "fp8_e4m3"},
}
"""SGLang's names; the reference engine has the same."""


def precision_flags(kind: EngineKind, precision: Precision) -> dict[str, str]:
    """Flags of the engine's command line."""
    flags = dict(FLAGS[precision])
    if kind == "reference" and precision.startswith("fp8"):
        # So that the rounding to fp8 is all that differs from fp32; engine_args {dtype: bfloat16} adds bf16's.
        flags["dtype"] = "float32"
    return flags


def refusal(kind: EngineKind, precision: Precision) -> str | None:
    """Why an engine of this kind cannot compute in ``precision`` on this machine; None: it can."""
    if kind == "sglang" and precision.startswith("fp8") and platform.current().name == "cpu":
        return (
            f"rollout.precision = {precision}: SGLang computes in fp8 on a GPU, or on a CPU with AMX and kernels that "
            "`make sglang` does not install; set rollout.engine=reference, which rounds to fp8 on any CPU"
        )
    return None


def check_block_fp8(model_path: Path) -> None:
    """Raises EngineError unless the HF folder's weights are fp8 in 128 x 128 blocks.

    SGLang 0.5.21 quantises other checkpoints while loading, a scale an output channel or an expert (Fp8LinearMethod,
    Fp8MoEMethod), into parameters that have lost their weight loaders: the first weight update would fail.
    """
    if not is_block_fp8(model_path):
        raise EngineError(
            f"rollout.precision = fp8: the weights in {model_path} are not fp8 in blocks of {BLOCK} x {BLOCK} "
            "(quantization_config of its config.json), and SGLang cannot update weights that it quantised itself; "
            "leave rollout.engine_args.model-path out, and such a copy of model.path is made"
        )


def is_block_fp8(model_path: Path) -> bool:
    """What the HF folder's config.json says of its weights. Raises EngineError where it cannot be read."""
    try:
        config: dict[str, Any] = json.loads((model_path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise EngineError(f"model folder {model_path}: no config.json that can be read ({error})") from None
    found = config.get("quantization_config") or {}
    return found.get("quant_method") == "fp8" and found.get("weight_block_size") == [BLOCK, BLOCK]
