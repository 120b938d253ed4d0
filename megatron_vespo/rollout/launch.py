"""Starting an engine of either kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.rollout import sglang
from megatron_vespo.rollout.client import HttpEngine
from megatron_vespo.rollout.precision import EngineKind, Precision, check_block_fp8, precision_flags, refusal
from megatron_vespo.rollout.process import EngineProcess, free_port
from megatron_vespo.rollout.protocol import EngineError

HOST = "127.0.0.1"


def launch_engine(
    kind: EngineKind,
    model_path: Path,
    *,
    log_file: Path,
    precision: Precision = "bf16",
    seed: int = 0,
    weight_version: int = 0,
    engine_args: Mapping[str, Any] | None = None,
    routed_experts: bool = False,
    launch_timeout_s: float = 600.0,
    request_timeout_s: float = 600.0,
) -> HttpEngine:
    """Start an engine on a free port of the loopback interface and wait until it answers.

    Args:
        model_path: HF-format checkpoint folder, whose weights become ``weight_version``.
        engine_args: further flags of the engine's command line, named as there without the dashes; True gives a bare
            flag, a list several values. They override ours.
        routed_experts: requests may ask for their routing (the reference engine always answers them).

    Raises:
        EngineError: it cannot compute in ``precision`` here; it ended early or was not healthy in time, and the
            message holds the end of its log.
    """
    if reason := refusal(kind, precision):
        raise EngineError(reason)
    flags: dict[str, Any] = {
        "model-path": model_path,
        "host": HOST,
        "port": free_port(HOST),
        **precision_flags(kind, precision),
        "random-seed": seed,
        "weight-version": weight_version,
    }
    extra = {name.replace("_", "-"): value for name, value in (engine_args or {}).items()}
    if kind == "sglang":
        module, flags, env = sglang.command(flags | {"enable-return-routed-experts": routed_experts})
    else:
        module, env = "megatron_vespo.rollout.reference", {"OMP_NUM_THREADS": str(extra.get("threads", 1))}
    flags |= extra
    if kind == "sglang" and flags.get("quantization") == "fp8":
        check_block_fp8(Path(flags["model-path"]))
    process = EngineProcess([sys.executable, "-m", module, *_command_line(flags)], log_file, env)
    url = f"http://{flags['host']}:{flags['port']}"
    try:
        process.wait_until_healthy(url, launch_timeout_s)
    except BaseException:
        process.shutdown(grace_s=0)
        raise
    return HttpEngine(url, process=process, request_timeout_s=request_timeout_s)


def _command_line(flags: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        if value is False or value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words
