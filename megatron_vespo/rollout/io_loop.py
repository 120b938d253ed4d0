"""One thread of this process, with one event loop, waits for all engines at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


_starting = threading.Lock()


def io_loop() -> asyncio.AbstractEventLoop:
    """The loop, started at the first call."""
    # Many threads may be the first at once (episodes are), and ``cache`` alone would let each start a loop of its own.
    with _starting:
        return _started()


@cache
def _started() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rollout-io", daemon=True).start()
    return loop


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on the loop and wait, from any other thread; it is cancelled where the waiting is interrupted."""
    future = asyncio.run_coroutine_threadsafe(coroutine, io_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def call(function: Callable[..., T], *arguments: Any) -> T:
    """Call it on the loop, between two steps of whatever runs there, and wait for what it returns."""

    async def on_loop() -> T:
        return function(*arguments)

    return wait_for(on_loop())
