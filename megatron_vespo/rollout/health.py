"""Whether an engine will serve: waiting until it does after a launch, and telling a hung one from a busy one.

What is known, and how long it is waited for:

- *loading, compiling, warming up*: the process runs, nothing listens or /health says 503, or the warm-up generation is
  under way. Never ended for that within ``rollout.launch_timeout_s``.
- *busy*, *paused*: the part that computes answers /server_info between two of its steps (SGLang's scheduler, the
  reference engine's decoding thread). Any answer within ``rollout.hang_timeout_s`` is a sign of life; so that figure
  must exceed the longest single step, a compilation in it included.
- *hung*: something accepts connections, and no sign of life came for ``rollout.hang_timeout_s``. A front that still
  says 200 to /health does not count: SGLang's does so beside a scheduler that stands still.
- *dead*: the process has ended, or nothing accepts connections any more. Known at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx
import numpy as np

from megatron_vespo.rollout.client import HttpEngine
from megatron_vespo.rollout.process import EngineProcess
from megatron_vespo.rollout.protocol import Engine, EngineDown, EngineError, GenerateRequest, SamplingParams

POLL_S = 0.1
SAY_EVERY_S = 15.0
WARMUP_PROMPT_TOKENS = 16


async def sign_of_life(engine: Engine, patience_s: float) -> None:
    """Returns when the engine gave one. Raises EngineDown where it is dead, or gave none for ``patience_s``."""
    try:
        await asyncio.wait_for(engine.ping(), patience_s)
    except TimeoutError:
        raise EngineDown(
            f"{engine.url} hangs: no sign of life for {patience_s:g} s (rollout.hang_timeout_s), though something "
            "accepts connections there"
        ) from None


def wait_until_ready(
    url: str,
    timeout_s: float,
    process: EngineProcess | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Poll ``url``/health until it says 200; ``say`` is told now and then what is waited for.

    Raises EngineError as soon as ``process`` has ended, or after ``timeout_s``, with the end of its log.
    """
    started = time.monotonic()
    said = started
    stage = "nothing listens there yet"
    # trust_env off: a proxy of the environment must not see loopback traffic.
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while True:
            if process is not None and process.exit_code() is not None:
                raise EngineError(f"{url} did not start: {process.exit_report()}")
            try:
                status = client.get(f"{url}/health").status_code
                if status == 200:
                    return
                stage = f"it listens, and /health says {status}: loading or compiling"
            except httpx.TimeoutException:
                stage = "it accepts connections and does not answer"
            except httpx.TransportError:
                pass  # not listening yet
            now = time.monotonic()
            if now - started > timeout_s:
                log = f"; the end of {process.log_file}:\n{process.log_tail()}" if process else ""
                raise EngineError(
                    f"{url} was not ready within {timeout_s:g} s (rollout.launch_timeout_s): {stage}{log}"
                )
            if say is not None and now - said > SAY_EVERY_S:
                said = now
                last = f"; its log: {process.log_tail(1)[:200]}" if process else ""
                say(f"{url} after {now - started:.0f} s: {stage}{last}")
            time.sleep(POLL_S)


def warm_up(engine: HttpEngine, tokens: int, timeout_s: float) -> None:
    """Generate ``tokens`` tokens twice over, so that kernels are compiled before a request's clock runs.

    Raises EngineError where it fails, or takes longer than ``timeout_s``.
    """
    prompt = np.zeros(WARMUP_PROMPT_TOKENS, np.int32)
    request = GenerateRequest("warm-up", prompt, SamplingParams(max_tokens=tokens), n=2, seed=0)
    try:
        engine.generate([request], timeout_s)
    except EngineError as error:
        raise EngineError(
            f"warm-up (rollout.warmup_tokens = {tokens}) within {timeout_s:.0f} s failed: {error}"
        ) from error
