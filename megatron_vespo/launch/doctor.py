"""What a node has and lacks for a run, found before anything is started there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from megatron_vespo import platform
from megatron_vespo.config.load import ConfigError, ResolvedConfig
from megatron_vespo.launch.allocation import check_allocation

GIB = 1 << 30
TEMPORARY_BYTES = GIB
"""What Ray's logs and sockets want of /tmp."""
CHECKPOINT_BYTES = 14
"""Of a parameter: bfloat16, and the optimizer's float32 master and two moments."""
USED_BYTES = 2 * GIB
"""Of a GPU's memory, held by someone else's process."""


@dataclass(frozen=True)
class Finding:
    check: str
    text: str
    refused: bool = False

    def __str__(self) -> str:
        return f"{'REFUSED' if self.refused else 'ok':8} {self.check:12} {self.text}"


class Refusal(Exception):
    """A node or a run that would fail later; the message says how it is mended."""


def examine(resolved: ResolvedConfig | None) -> list[Finding]:
    """Of this node; and of the run, which under srun the first node alone does."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("GPUs", lambda: _gpus(resolved)),
        ("collectives", _collectives),
        ("ports", _ports),
        ("/tmp", _temporary),
    ]
    if resolved is not None and os.environ.get("SLURM_PROCID", "0") == "0":
        checks += [
            ("allocation", lambda: _allocation(resolved)),
            ("run", lambda: _run(resolved)),
            ("disk", lambda: _disk(resolved)),
        ]
    return [_finding(check, examined) for check, examined in checks]


def _finding(check: str, examined: Callable[[], str]) -> Finding:
    try:
        return Finding(check, examined())
    except (Refusal, ConfigError) as refusal:
        return Finding(check, str(refusal), refused=True)


# ---------------------------------------------------------------------------------------------- the node


def _versions() -> str:
    wanted = [Requirement(text) for text in requires("megatron_vespo") or []]
    wrong = list(_unmet([r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]))
    if wrong:
        raise Refusal(f"{'; '.join(wrong)}; install this project again in the environment of {sys.executable}")
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "ray", "transformers"))


def _unmet(wanted: list[Requirement]) -> Iterator[str]:
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield f"{requirement} is not installed"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement} is needed, {found} is installed"


def _gpus(resolved: ResolvedConfig | None) -> str:
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    gpus = platform.current().accelerators()
    if not gpus:
        if given and resolved is not None and resolved.run.rollout.engine == "sglang":
            raise Refusal(f"Slurm gave this node {given} GPUs and torch sees none: {_nvidia('name') or 'no driver'}")
        return "none; the run computes on CPUs"
    if resolved is not None and len(gpus) < resolved.run.cluster.ranks_per_node:
        origin = resolved.provenance.get("cluster.ranks_per_node", "default")
        raise Refusal(
            f"{origin}: cluster.ranks_per_node = {resolved.run.cluster.ranks_per_node}, and torch sees {len(gpus)} "
            "GPUs here; submit with more --gpus-per-node, or lower it"
        )
    used = {i: gpu.total_bytes - gpu.free_bytes for i, gpu in enumerate(gpus)}
    busy = [f"GPU {i} has {size / GIB:.0f} GiB in use" for i, size in used.items() if size > USED_BYTES]
    if busy:
        raise Refusal(f"{', '.join(busy)}: a process of an earlier job; take another node (--exclude={_host()})")
    return f"{len(gpus)} x {gpus[0].name}, driver {_nvidia('driver_version')}"


def _nvidia(field: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def _collectives() -> str:
    try:
        return platform.current().try_collective() or "gloo, on CPUs"
    except RuntimeError as error:
        raise Refusal(f"a sum over one GPU failed: {error}; NCCL_DEBUG=INFO tells more") from None


def _ports() -> str:
    """Other nodes must reach this one under the address that its host name means here."""
    host = _host()
    try:
        address = socket.gethostbyname(host)
        with socket.create_server((address, 0)) as server, socket.create_connection(server.getsockname(), 10):
            pass
    except OSError as error:
        raise Refusal(f"{host}: no port can be opened there ({error}); its host name must mean its address") from None
    if address.startswith("127.") and int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        raise Refusal(f"{host} means {address} here, where no other node reaches it; mend /etc/hosts of the node")
    return f"{host} is {address}"


def _temporary() -> str:
    free = shutil.disk_usage("/tmp").free
    if free < TEMPORARY_BYTES:
        raise Refusal(f"{free / GIB:.1f} GiB free on {_host()}, Ray wants {TEMPORARY_BYTES / GIB:.0f}; clear it")
    return f"{free / GIB:.0f} GiB free"


def _host() -> str:
    return socket.gethostname()


# ---------------------------------------------------------------------------------------------- the run


def _allocation(resolved: ResolvedConfig) -> str:
    check_allocation(resolved, on_gpus=bool(platform.current().accelerators()))
    return f"{os.environ.get('SLURM_JOB_NUM_NODES', 'no')} nodes by Slurm"


def _run(resolved: ResolvedConfig) -> str:
    from megatron_vespo.loop.preflight import check_run

    plan = check_run(resolved.run)
    return f"{resolved.run.name}: {plan.layout.world_size} ranks, {resolved.run.rollout.engine_count} engines"


def _disk(resolved: ResolvedConfig) -> str:
    config = resolved.run
    folder = next(path for path in (config.directory, *config.directory.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    weights = sum(file.stat().st_size for file in Path(config.model.path).glob("*.safetensors"))
    needed = weights // 2 * CHECKPOINT_BYTES * (config.checkpoint.keep + 1)
    if free < needed:
        raise Refusal(
            f"run_dir = {config.directory}: {free / GIB:.0f} GiB free, and {config.checkpoint.keep + 1} checkpoints "
            f"take about {needed / GIB:.0f}; set run_dir to a larger file system, or lower checkpoint.keep"
        )
    return f"{free / GIB:.0f} GiB free, checkpoints take up to {needed / GIB:.1f}"
