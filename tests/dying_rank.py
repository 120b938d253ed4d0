"""``objective.name=dying_rank.vespo``: rank 0 of the trainer dies once, in the middle of its second sync,
with the engines paused and their weights half written.

Objectives are what a rank imports by a name from the config, so that a test gets into its process this way. That it
has died is remembered by the file that DYING_RANK names.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from megatron_vespo.objectives.catalog import OBJECTIVES
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.transports import broadcast, shared_memory

SYNC = 2


def vespo(**params: Any) -> Any:
    for channel in (broadcast.Broadcast, shared_memory.SharedMemory):
        open_, send = channel.open, channel.send
        syncs, sent = [], []

        def opening(self: Any, open_: Any = open_, syncs: list = syncs, sent: list = sent) -> None:
            syncs.append(1)
            sent.clear()
            open_(self)

        def sending(self: Any, bucket: Bucket, send: Any = send, syncs: list = syncs, sent: list = sent) -> None:
            send(self, bucket)
            sent.append(1)
            died = Path(os.environ["DYING_RANK"])
            if len(syncs) == SYNC and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        channel.open, channel.send = opening, sending  # type: ignore[method-assign]
    return OBJECTIVES["vespo"].factory(**params)
