"""Starting an engine of either kind."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_vespo.config.engine_flags import by_flag_name
from megatron_vespo.platform.sglang_server import KEY_VARIABLE
from megatron_vespo.ports import free_port
from megatron_vespo.rollout import sglang
from megatron_vespo.rollout.client import HttpEngine
from megatron_vespo.rollout.health import wait_until_ready, warm_up
from megatron_vespo.rollout.precision import EngineKind, Precision, check_block_fp8, precision_flags, refusal
from megatron_vespo.rollout.process import EngineProcess
from megatron_vespo.rollout.protocol import EngineError

LOOPBACK = "127.0.0.1"
OURS = ("host", "port", "weight-version", "api-key", "tokenizer-worker-num")
"""Flags of the command line that ``engine_args`` may not set."""


def launch_engine(
    kind: EngineKind,
    model_path: Path,
    *,
    log_file: Path,
    precision: Precision = "bf16",
    seed: int = 0,
    weight_version: int = 0,
    host: str = LOOPBACK,
    key: str | None = None,
    engine_args: Mapping[str, Any] | None = None,
    routed_experts: bool = False,
    gives_up_memory: bool = False,
    devices: Sequence[str] = (),
    launch_timeout_s: float = 600.0,
    request_timeout_s: float = 1800.0,
    warmup_tokens: int = 0,
    say: Callable[[str], None] | None = None,
) -> HttpEngine:
    """Start an engine on a free port of ``host`` and wait until it answers, and has generated ``warmup_tokens``.

    Args:
        model_path: HF-format checkpoint folder, whose weights become ``weight_version``.
        host: address to listen on. Another than loopback's wants a ``key``, without which the engine answers nobody.
        engine_args: further flags of the engine's command line (:func:`command_line`). They override ours.
        routed_experts: requests may ask for their routing (the reference engine always answers them).
        gives_up_memory: it may be told to (``Engine.hold``); the reference engine always may.
        devices: all that it sees, as CUDA_VISIBLE_DEVICES names them, those that it computes on first; empty: those
            that this process sees.
        launch_timeout_s: for loading, compiling and warming up together.
        say: told every now and then what the launch is waiting for.

    Raises:
        EngineError: it cannot compute in ``precision`` here; it ended early or was not ready in time, and the message
            holds the end of its log.
    """
    if reason := refusal(kind, precision):
        raise EngineError(reason)
    extra = flag_names(engine_args or {})
    if host != LOOPBACK and key is None:
        raise EngineError(f"an engine that listens on {host} wants a key: without one, anyone may set its weights")
    flags: dict[str, Any] = {
        "model-path": model_path,
        "host": host,
        "port": free_port(host),
        **precision_flags(kind, precision),
        "random-seed": seed,
        "weight-version": weight_version,
    }
    if kind == "sglang":
        asked = {
            "enable-return-routed-experts": routed_experts,
            "enable-memory-saver": gives_up_memory,
            # What a turn finds is what the last one left: no sync needs to come between the two.
            "enable-weights-cpu-backup": gives_up_memory,
        }
        module, flags, env = sglang.command(flags | asked)
    else:
        module, env = "megatron_vespo.rollout.reference", {"OMP_NUM_THREADS": str(extra.get("threads", 1))}
    flags |= extra
    if kind == "sglang" and flags.get("quantization") == "fp8":
        check_block_fp8(Path(flags["model-path"]))
    if key is not None:
        env = {**env, KEY_VARIABLE: key}
    if devices:
        env = {**env, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    deadline = time.monotonic() + launch_timeout_s
    process = EngineProcess([sys.executable, "-m", module, *command_line(flags)], log_file, env)
    url = f"http://{host}:{flags['port']}"
    try:
        wait_until_ready(url, launch_timeout_s, process, say)
        engine = HttpEngine(url, key=key, process=process, request_timeout_s=request_timeout_s)
        if key is not None:
            _check_locked(url)
        if warmup_tokens:
            warm_up(engine, warmup_tokens, max(deadline - time.monotonic(), 1.0))
    except BaseException:
        process.shutdown(grace_s=0)
        raise
    return engine


def flag_names(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """``engine_args`` by the command line's own names. Raises EngineError for a flag that is the run's to set."""
    flags = by_flag_name(engine_args)
    for name in OURS:
        if name in flags:
            raise EngineError(f"rollout.engine_args: {name} = {flags[name]!r} is set by the run itself; leave it out")
    return flags


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Flags as words: True gives a bare flag, False and None nothing, a list several values, a mapping its JSON."""
    words: list[str] = []
    for name, value in flags.items():
        if value is False or value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += [str(item) for item in value]
        elif isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif value is not True:
            words.append(str(value))
    return words


def _check_locked(url: str) -> None:
    status = httpx.get(f"{url}/model_info", trust_env=False, timeout=30).status_code
    if status != 401:
        raise EngineError(f"{url} answers a request without a key (HTTP {status}); it must not listen there")
