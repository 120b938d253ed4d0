"""Start a Ray cluster on this machine, or join one; end it whatever happens."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from megatron_vespo.config.schema import RunConfig

TRAINER_NODE, ROLLOUT_NODE = "trainer", "rollout"
"""Ray's custom resources by which the nodes of a cluster are told apart (cluster.rollout_nodes); one of it a node."""


class ClusterError(RuntimeError):
    """The cluster cannot run this layout, or a part of it died; the message says which and where its log is."""


def spans_nodes(config: RunConfig) -> bool:
    """Whether ranks and engines may sit on more than this machine: what they share must then be reachable from all."""
    return config.cluster.nodes > 1 or _address(config) is not None


def _address(config: RunConfig) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def ray_cluster(config: RunConfig) -> Iterator[None]:
    """Ray for the time of a run: ``cluster.address`` (or RAY_ADDRESS) is joined, otherwise one is started here."""
    address = _address(config)
    # Ranks and engines spend most of their time waiting for one another, so a laptop may hold more than it has cores.
    seats = config.cluster.world_size + config.rollout.engines
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs workers at low priority by default, which starves trainers beside anything else on the node.
    os.environ.setdefault("RAY_worker_niceness", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            num_cpus=None if address else max(seats, os.cpu_count() or 1),
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError) as error:
        mend = ""
        if "InvalidAuthToken" in str(error.__cause__):
            # Ray itself finds the token only for the address "auto".
            mend = "; it wants a token: set RAY_AUTH_MODE=token, with the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        raise ClusterError(f"cluster.address = {address!r}: Ray cannot be reached ({error}{mend})") from None
    # Ray puts a handler of its own there, which aborts the process before it can end its children.
    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        ray.shutdown()
