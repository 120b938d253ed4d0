"""A process group of a sender and its receivers, beside whatever group each of them trains or serves in.

torch's own groups are parts of one world that all processes joined at their start. This one is built of the classes
below those, with the keys in the store that SGLang's ``init_weights_update_group`` uses: its processes can join.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, TCPStore

DEVICES = {"gloo": "cpu", "nccl": "cuda"}


class BroadcastGroup:
    """Rank 0 sends, all others receive. Raises DistStoreError where not all come within ``timeout``."""

    def __init__(self, name: str, store: TCPStore, rank: int, size: int, backend: str, timeout: timedelta) -> None:
        self.rank = rank
        keys = PrefixStore(f"{DEVICES[backend]}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        self._group: Any = _backend(backend, keys, rank, size, timeout)

    def broadcast(self, flat: torch.Tensor) -> None:
        """``flat`` of rank 0 into everyone's, which have its size. Returns when this rank's is whole or sent."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([flat], options).wait()


def _backend(name: str, store: PrefixStore, rank: int, size: int, timeout: timedelta) -> Any:
    if name == "nccl":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return ProcessGroupNCCL(store, rank, size, options)
    from torch.distributed import ProcessGroupGloo

    return ProcessGroupGloo(store, rank, size, timeout)


def open_store(address: str, timeout: timedelta) -> TCPStore:
    """The rendezvous of a new group, on a free port of the interface that has ``address``."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return TCPStore(address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def connect_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    return TCPStore(address, port, None, False, timeout)


def has_joined(store: TCPStore, rank: int) -> bool:
    """Whether ``rank`` has left its address for gloo's other ranks. (NCCL leaves none.)"""
    return any(key.endswith(f"/{rank}") for key in store.list_keys())
