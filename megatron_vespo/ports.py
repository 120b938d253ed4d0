"""TCP ports that nobody uses. Imports nothing of ours: what runs Ray on a node does not wait for torch."""

from __future__ import annotations

import errno
import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that the system hands out by itself (32,768 and up on Linux): until an engine has loaded its model and
listens, a port of these could go to any connection."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of PORTS, at random, that nobody uses right now. Raises OSError if ``host`` is not of this machine."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
    raise OSError(errno.EADDRINUSE, f"none of 100 ports of {host} between {PORTS.start} and {PORTS.stop} is free")
