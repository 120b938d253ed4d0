"""Ray on the nodes of an allocation that has no Ray yet: each node runs ``serve``, and one ``await`` before it is used.

The nodes meet in a folder that all of them see: the first writes its address there, on a port that was free.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from megatron_vespo.ports import free_port

TRIES = 5
RETRY_S = 5.0
END_S = 20.0
LOGS_KEPT = ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err")


class NotThere(RuntimeError):
    """Nodes did not join in time; the message says how many, and where their logs are."""


def address_file(folder: Path) -> Path:
    return folder / "ray_address"


def own_address() -> str:
    """The address under which other nodes reach this one."""
    return socket.gethostbyname(socket.gethostname())


def serve(folder: Path, *, first: bool, roles: list[str], temporary: Path, deadline_s: float) -> int:
    """Runs Ray on this node until SIGTERM or until it fails for good; its exit code. Keeps Ray logs in ``folder``."""
    signal.signal(signal.SIGTERM, _end)
    try:
        for attempt in range(TRIES):
            node = subprocess.Popen(
                _command(folder, first, roles, temporary, deadline_s), start_new_session=True, env=_environment()
            )
            try:
                # A raylet whose agent was slow to come gives up 15 s after its start: a loaded node needs a second try.
                status = node.wait()
            finally:
                _keep_logs(folder, temporary)  # first: Slurm may leave little time
                _terminate(node)
            print(f"ray ended with exit code {status}, try {attempt + 1} of {TRIES}", flush=True)
            time.sleep(RETRY_S)
        return 1
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _command(folder: Path, first: bool, roles: list[str], temporary: Path, deadline_s: float) -> list[str]:
    command = ["ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={own_address()}"]
    command += [f"--resources={json.dumps(dict.fromkeys(roles, 1))}", f"--temp-dir={temporary}"]
    # The others are free ones by Ray's own choice; this one would be the same for every job on a node.
    command += [f"--dashboard-agent-listen-port={free_port(own_address())}"]
    if cpus := os.environ.get("SLURM_CPUS_ON_NODE"):
        command += [f"--num-cpus={cpus}"]
    if memory := os.environ.get("RAY_OBJECT_STORE_BYTES"):
        command += [f"--object-store-memory={memory}"]
    if first:
        address = f"{own_address()}:{free_port(own_address())}"
        written = address_file(folder).with_suffix(".new")
        written.write_text(address)
        written.replace(address_file(folder))
        port = address.rpartition(":")[2]
        return [*command, "--head", f"--port={port}", "--include-dashboard=false"]
    return [*command, f"--address={_address(folder, deadline_s)}"]


def _environment() -> dict[str, str]:
    # Ray runs workers at low priority by default, which starves trainers beside anything else on the node.
    return {**os.environ, "RAY_worker_niceness": "0"}


def _address(folder: Path, deadline_s: float) -> str:
    deadline = time.monotonic() + deadline_s
    while not address_file(folder).exists():
        if time.monotonic() > deadline:
            raise NotThere(f"{address_file(folder)}: the first node did not write it within {deadline_s:g} s")
        time.sleep(0.5)
    return address_file(folder).read_text()


def await_nodes(folder: Path, count: int, deadline_s: float) -> str:
    """Ray's address, once ``count`` nodes are alive in it. Raises NotThere."""
    import ray

    started = time.monotonic()
    address = _address(folder, deadline_s)
    alive: list[str] = []
    while len(alive) < count:
        if time.monotonic() - started > deadline_s:
            raise NotThere(f"{len(alive)} of {count} nodes are in Ray after {deadline_s:g} s: {' '.join(alive)}")
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            alive = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])
        except (ConnectionError, RuntimeError):  # the first node is not up yet, or starts again elsewhere
            address = address_file(folder).read_text()
        time.sleep(0.5)
    ray.shutdown()
    return address


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # ray start --block ends what it started
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _keep_logs(folder: Path, temporary: Path) -> None:
    for name in LOGS_KEPT:
        for log in temporary.glob(f"session_latest/logs/{name}"):
            shutil.copyfile(log, folder / f"ray-{socket.gethostname()}.{name}")


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it again
    sys.exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_vespo.launch.ray_nodes", description=__doc__)
    parser.add_argument("what", choices=("serve", "await"))
    parser.add_argument("folder", type=Path, help="that all nodes see")
    parser.add_argument("--first", action="store_true", help="serve: this node is the head")
    parser.add_argument("--roles", nargs="*", default=[], help="serve: custom resources of this node")
    parser.add_argument("--temporary", type=Path, help="serve: folder of this node, with a short path")
    parser.add_argument("--nodes", type=int, help="await: how many")
    parser.add_argument("--deadline", type=float, default=300.0, metavar="SECONDS")
    options = parser.parse_args()
    try:
        if options.what == "await":
            print(await_nodes(options.folder, options.nodes, options.deadline))
            return 0
        return serve(
            options.folder,
            first=options.first,
            roles=options.roles,
            temporary=options.temporary,
            deadline_s=options.deadline,
        )
    except NotThere as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
