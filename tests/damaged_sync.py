"""``objective.name=damaged_sync.vespo``: VESPO in a run whose trainer sends a damaged tensor at its second sync.

Objectives are what a rank imports by a name from the config, so that a test gets into its process this way.
"""

from __future__ import annotations

from typing import Any

from megatron_vespo.objectives.catalog import OBJECTIVES
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.transports.shared_memory import SharedMemory

VICTIM = "model.layers.1.self_attn.o_proj.weight"


def vespo(**params: Any) -> Any:
    send, seen = SharedMemory.send, []

    def damaging(channel: SharedMemory, bucket: Bucket) -> None:
        start = 0
        for spec in bucket.specs:
            if spec.name == VICTIM:
                seen.append(spec.name)
                if len(seen) == 2:
                    bucket.flat[start + 7] ^= 32
            start += spec.nbytes
        send(channel, bucket)

    SharedMemory.send = damaging  # type: ignore[method-assign]
    return OBJECTIVES["vespo"].factory(**params)
