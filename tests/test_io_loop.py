"""The one event loop that waits for all engines."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from megatron_vespo.rollout import io_loop


def test_threads_that_ask_first_at_once_share_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loops would share the engines' HTTP clients, which then lose track of their own connections."""
    new_loop = asyncio.new_event_loop

    def slow_new_loop() -> asyncio.AbstractEventLoop:
        time.sleep(0.05)
        return new_loop()

    monkeypatch.setattr(asyncio, "new_event_loop", slow_new_loop)
    # Its own, so that other tests keep theirs.
    monkeypatch.setattr(io_loop, "_started", cache(io_loop._started.__wrapped__))
    with ThreadPoolExecutor(8) as threads:
        loops = list(threads.map(lambda _: io_loop.io_loop(), range(8)))
    assert len(set(map(id, loops))) == 1
