"""SGLang's command line, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from megatron_vespo import platform
from megatron_vespo.platform.sglang_cpu import SGLANG_VERSION
from megatron_vespo.rollout.protocol import EngineError

CPU_FLAGS: dict[str, Any] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    # Of the machine's memory, and the KV cache of small models: an engine on a CPU shares it with the trainer.
    "mem-fraction-static": 0.3,
    "max-total-tokens": 20000,
    # Otherwise idle schedulers spin and starve everything else.
    "sleep-on-idle": True,
}
CPU_ENV = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
ENV = {
    # /health would sample a token, and so call an engine ill that is only paused.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}


def command(flags: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Module to run, its flags, its environment. Raises EngineError where SGLang is missing or another version."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise EngineError(
            f"rollout.engine=sglang, but SGLang is not installed: run `make sglang` (CPU) or "
            f"`pip install sglang=={SGLANG_VERSION}` (CUDA), or set rollout.engine=reference"
        ) from None
    if installed != SGLANG_VERSION:
        raise EngineError(
            f"rollout.engine=sglang knows SGLang {SGLANG_VERSION}, {installed} is installed; install that"
        )
    if not entry_points(group="sglang.srt.plugins", name="megatron_vespo"):
        raise EngineError(
            "rollout.engine=sglang: the installed megatron_vespo does not name its SGLang plugin, without which no "
            "weight sync is proven; install it again (`make env`, or `pip install --editable .`)"
        )
    # Tokens in, tokens out; no tokenizer is needed. The warm-up would send text.
    ours: dict[str, Any] = {**flags, "skip-tokenizer-init": True, "skip-server-warmup": True}
    if platform.current().name == "cuda":
        return "megatron_vespo.platform.sglang_server", ours, ENV
    return "megatron_vespo.platform.sglang_cpu", {**ours, **CPU_FLAGS}, {**ENV, **CPU_ENV}
