"""A real Slurm cluster of several nodes on one machine: slurmctld here, a slurmd in namespaces of its own a node.

Needs root, and Debian's slurm-wlm, munge and iproute2 (`make test-slurm` installs them). The nodes see one another
through a bridge; each has its own /tmp, /run, /dev/shm, host name and processes, so that it can be cut off or lose
power as a machine does. GPUs are device files without anything behind them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from tiny_run import descendants, wait_until

NETWORK = "10.77.31"
BRIDGE = "vespobr"
SOCKETS = Path("/run/vespo-slurm")
GPUS = 8
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare", "nsenter")
OF_THE_NODE = {"node_init.sh", "munged", "slurmd", "sleep"}
"""Processes that a node without jobs has."""

CONF = """\
ClusterName=vespo
SlurmctldHost={host}({network}.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={sockets}/munge,cred_expire=5
MpiDefault=none
ProctrackType={proctrack}
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,requeue_delay=1
ReturnToService=2
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile=/run/vespo-slurm/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmctldTimeout=10
SlurmdTimeout={node_timeout}
InactiveLimit=0
KillWait=15
MinJobAge=600
UnkillableStepTimeout=20
GresTypes=gpu
PlugStackConfig={folder}/plugstack.conf
NodeName=n[1-{nodes}] NodeAddr={network}.[11-{last}] CPUs=16 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no such cluster here."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed: `make test-slurm` installs Slurm"
    return None if os.geteuid() == 0 else "an emulated Slurm cluster needs root"


class SlurmCluster:
    """Nodes n1, n2, ...; up inside ``with``. ``shared``: what they see of this machine's /tmp, /run and /dev/shm."""

    def __init__(self, folder: Path, nodes: int, shared: Iterable[Path], node_timeout_s: int = 10) -> None:
        self.folder, self.names = folder.resolve(), [f"n{i + 1}" for i in range(nodes)]
        self.shared = [str(path.resolve()) for path in (self.folder, *shared)]
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._write(node_timeout_s)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def _write(self, node_timeout_s: int) -> None:
        nodes = len(self.names)
        for name in ("log", "state", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        hosts = [f"{NETWORK}.{11 + i} {name}" for i, name in enumerate(self.names)]
        host = socket.gethostname()
        text = "\n".join(["127.0.0.1 localhost", f"{NETWORK}.1 {host}", *hosts]) + "\n"
        (self.folder / "hosts").write_text(text)
        freezer = os.access("/sys/fs/cgroup/freezer", os.W_OK)
        conf = CONF.format(
            host=host,
            network=NETWORK,
            sockets=SOCKETS,
            proctrack="proctrack/cgroup" if freezer else "proctrack/linuxproc",
            folder=self.folder,
            node_timeout=node_timeout_s,
            nodes=nodes,
            last=10 + nodes,
            gpus=GPUS,
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "plugstack.conf").touch()
        cgroup = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"
        (self.folder / "cgroup.conf").write_text(cgroup)
        for i in range(GPUS):
            subprocess.run(["mknod", self.folder / f"dev/gpu{i}", "c", "1", "3"], check=True)
        devices = f"NodeName=n[1-{nodes}] Name=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(devices)

    # ------------------------------------------------------------------------------------------ up and down

    def __enter__(self) -> SlurmCluster:
        try:
            self._remove_network()  # of an emulation that was killed
            _ip("link", "add", BRIDGE, "type", "bridge")
            _ip("addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
            _ip("link", "set", BRIDGE, "up")
            SOCKETS.mkdir(mode=0o755, exist_ok=True)
            log = self.folder / "log"
            munged = ["munged", "--foreground", "--force", f"--key-file={self.folder / 'munge.key'}"]
            munged += [f"--socket={SOCKETS / 'munge'}", f"--pid-file={SOCKETS / 'munged.pid'}"]
            munged += [f"--seed-file={SOCKETS / 'seed'}", f"--log-file={log / 'munged.log'}", "--num-threads=1"]
            self._start(munged)
            wait_until((SOCKETS / "munge").exists, 60, "munged's socket")
            self._start(["slurmctld", "-D"])
            for name in self.names:
                self.power_on(name)
            wait_until(lambda: len(self.idle()) == len(self.names), 60, f"nodes idle (logs: {log})")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self.names:
            self.power_off(name)
        for daemon in reversed(self._daemons):
            daemon.kill()  # slurmctld would wait for its nodes
            daemon.wait()
        self._remove_network()
        shutil.rmtree(SOCKETS, ignore_errors=True)
        for name in self.names:
            for group in sorted(Path("/sys/fs/cgroup/freezer").glob(f"slurm_{name}/**/"), reverse=True):
                if group.is_dir():
                    group.rmdir()

    def _start(self, command: list[str]) -> None:
        with (self.folder / "log" / f"{command[0]}.out").open("wb") as out:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def _remove_network(self) -> None:
        for name in self.names:
            _ip("link", "del", f"vespo-{name}", check=False)
            _ip("netns", "del", f"vespo-{name}", check=False)
        _ip("link", "del", BRIDGE, check=False)

    # ------------------------------------------------------------------------------------------ nodes

    def power_on(self, name: str) -> None:
        space = f"vespo-{name}"
        _ip("netns", "add", space)
        _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", space, "master", BRIDGE, "up")
        _ip("-n", space, "addr", "add", f"{NETWORK}.{10 + int(name[1:])}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        inside = ["unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        init = [str(Path(__file__).parent / "node_init.sh"), str(self.folder), name, *self.shared]
        command = ["nsenter", f"--net=/run/netns/{space}", *inside, *init]
        with (self.folder / "log" / f"init.{name}.log").open("wb") as out:
            self._nodes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def power_off(self, name: str, *, cable_first: bool = True) -> None:
        """Every process of the node ends at once. Without ``cable_first`` its peers still see connections close."""
        node = self._nodes.pop(name, None)
        if node is None:
            return
        if cable_first:
            self.cut_off(name)
        node.kill()
        node.wait()
        _ip("link", "del", f"vespo-{name}", check=False)
        _ip("netns", "del", f"vespo-{name}", check=False)

    def cut_off(self, name: str) -> None:
        _ip("link", "set", f"vespo-{name}", "down")

    def job_processes(self) -> list[str]:
        """Command lines of what jobs run on the nodes that are up."""
        found = []
        for node in self._nodes.values():
            for pid in descendants(node.pid):
                try:
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                    line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
                if name not in OF_THE_NODE and line:
                    found.append(f"{pid} {name}: {line}")
        return found

    # ------------------------------------------------------------------------------------------ Slurm's commands

    def ask(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Output of one of Slurm's commands; raises with what it said where it fails."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def idle(self) -> list[str]:
        try:
            return self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
        except RuntimeError:
            return []  # slurmctld does not answer yet

    def job(self, number: str) -> dict[str, str]:
        """``scontrol show job``, such as JobState, Restarts, ExitCode."""
        words = self.ask("scontrol", "show", "--oneliner", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, states: tuple[str, ...], timeout_s: float) -> dict[str, str]:
        started = time.monotonic()
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() - started > timeout_s:
                raise AssertionError(f"job {number} is {job['JobState']} after {timeout_s:g} s, not one of {states}")
            time.sleep(0.5)
        return job


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


def main() -> None:
    """``python tests/slurm/cluster.py FOLDER NODES SHARED...``: up until interrupted, to try things with."""
    import sys

    folder, nodes, *shared = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with SlurmCluster(Path(folder), int(nodes), [Path(path) for path in shared]) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
