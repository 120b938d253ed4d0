"""Programs that nobody has read, run one after the other where they can do little harm.

The calling process forks a supervisor; its child, process 1 of new namespaces (isolation.py), starts one program after
the other, ends whatever each leaves behind, and sends back what they wrote. A program is a fresh Python interpreter
with the standard library, an empty environment, limits on everything that setrlimit limits, no way to gain
privileges, a time limit, and a folder of its own that is gone afterwards.

Two protections:

* ``isolated``: no network (not even loopback), no other process to be seen or signalled, no file system but the
  system's programs and the interpreter, read-only. Root starts programs as a user that owns nothing; an ordinary user
  needs user namespaces.
* ``rlimits-only``: the limits alone. A program reads and writes whatever its user may, and reaches the network.

Neither is a virtual machine: a hole in the kernel is a hole in the sandbox.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vespo.rewards import isolation

Protection = Literal["isolated", "rlimits-only"]
PROBE_TIMEOUT_S = 60.0
PROGRAM_FD = 3
"""Where a program says that it has come to its end (Outcome.evidence)."""
FIRST_FREE_FD = 4
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Of each program; memory is of each of its processes, so that all of them hold ``processes`` times as much."""

    seconds: float = 5.0
    """Wall time; CPU time is limited to a second more."""
    total_seconds: float = 20.0
    """Wall time of all programs of one call together; those that it leaves no time for count as timed out."""
    memory_mb: int = 1024
    """Address space of a process."""
    processes: int = 8
    """Threads count too."""
    file_mb: int = 16
    """A file, what is written to standard output included; all files of a call together hold four times as much."""
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Program:
    arguments: tuple[str, ...]
    """Of the interpreter, beside -I -S -X utf8."""
    files: tuple[tuple[str, str], ...]
    """Name and text, in its folder when it starts."""
    stdin: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    exit_code: int
    """Negative: the signal that ended it."""
    stdout: str
    stderr: str
    evidence: bytes = b""
    """What it wrote to file descriptor 3."""
    timed_out: bool = False


NEVER_RUN = Outcome(exit_code=-signal.SIGKILL, stdout="", stderr="", timed_out=True)


def run_programs(
    programs: Sequence[Program],
    limits: Limits,
    protection: Protection,
    interpreter: str,
    go_on: Callable[[Outcome], bool] = lambda outcome: True,
) -> list[Outcome]:
    """One after the other, until ``go_on`` says no. Call it from a process without threads: it forks.

    ``interpreter``: path of the Python that runs them. Raises OSError where the sandbox could not be set up.
    """
    user = isolation.program_user()
    reader, writer = os.pipe()
    folder = tempfile.mkdtemp(prefix="vespo-code-") if protection == "rlimits-only" else None
    caller = os.getpid()
    try:
        supervisor = os.fork()
        if supervisor == 0:
            _end_with(caller)
            _supervise(programs, limits, _Place(folder, interpreter, user), go_on, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            message = pipe.read()
        os.waitpid(supervisor, 0)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    if not message:
        raise OSError("the sandbox was killed")
    found = pickle.loads(message)  # written by the fork of this process, which no program can write to
    if isinstance(found, str):
        raise OSError(found)
    return found


def why_not(protection: Protection, interpreter: str) -> str | None:
    """Whether it works on this machine, tried in a process of its own: None, or why not."""
    command = [sys.executable, "-m", __name__, protection, interpreter]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"a trial program did not end within {PROBE_TIMEOUT_S:g} s"
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")[-500:]


# ---------------------------------------------------------------------------------------------- the supervisor


@dataclass(frozen=True, slots=True)
class _Place:
    folder: str | None
    """None: isolated, /work of a root of its own."""
    interpreter: str
    user: int | None


def _end_with(parent: int) -> None:
    """Be killed when the parent ends, however it ends. ``parent`` 0: it is outside of this process's namespace."""
    isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before that
        os._exit(1)


def _supervise(
    programs: Sequence[Program], limits: Limits, place: _Place, go_on: Callable[[Outcome], bool], writer: int
) -> None:
    """The forked supervisor; never returns. It stays in the caller's process group, and dies with it."""
    try:
        os.umask(0o022)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if place.folder is not None:
            _hide_memory()
            isolation.prctl(isolation.PR_SET_CHILD_SUBREAPER, 1)
            found = _run_all(programs, limits, place, place.folder, go_on)
            _send(writer, found)
            os._exit(0)
        isolation.enter_namespaces()
        _hide_memory()
        init = os.fork()
        if init == 0:
            _end_with(0)
            prefix = str(Path(place.interpreter).parents[1])
            isolation.enter_root([prefix], 4 * limits.file_mb)
            _send(writer, _run_all(programs, limits, place, "/work", go_on))
            os._exit(0)
        os.close(writer)
        os.waitpid(init, 0)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _send(writer, f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _hide_memory() -> None:
    """It is a copy of the caller's, environment included: programs of the same user must not read it."""
    isolation.prctl(isolation.PR_SET_DUMPABLE, 0)


def _send(writer: int, found: list[Outcome] | str) -> None:
    with os.fdopen(writer, "wb", closefd=False) as pipe:
        pickle.dump(found, pipe)


def _run_all(
    programs: Sequence[Program], limits: Limits, place: _Place, folder: str, go_on: Callable[[Outcome], bool]
) -> list[Outcome]:
    end = time.monotonic() + limits.total_seconds
    if place.user is not None:
        os.chmod(folder, 0o711)
    outcomes = []
    for number, program in enumerate(programs):
        seconds = min(limits.seconds, end - time.monotonic())
        mine = os.path.join(folder, str(number))
        outcomes.append(_run(program, mine, seconds, limits, place) if seconds > 0 else NEVER_RUN)
        if not go_on(outcomes[-1]):
            break
    return outcomes


def _run(program: Program, folder: str, seconds: float, limits: Limits, place: _Place) -> Outcome:
    os.mkdir(folder, 0o755)
    for name, text in program.files:
        Path(folder, name).write_text(text, encoding="utf-8", errors="surrogatepass")
    if place.user is not None:
        os.chown(folder, place.user, place.user)
    stdin, stdout, stderr, evidence = files = [os.memfd_create(name) for name in ("in", "out", "err", "end")]
    os.write(stdin, program.stdin.encode("utf-8", "surrogatepass")) if program.stdin else None
    os.lseek(stdin, 0, os.SEEK_SET)
    child = os.fork()
    if child == 0:
        _become_program(program, folder, files, seconds, limits, place)
    descriptor = os.pidfd_open(child)
    timed_out = not select.select([descriptor], [], [], seconds)[0]
    if timed_out:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(descriptor)
    _end_the_rest()
    shutil.rmtree(folder, ignore_errors=True)
    most = limits.file_mb * MIB
    outcome = Outcome(
        exit_code=status,
        stdout=os.pread(stdout, most, 0).decode("utf-8", "replace"),
        stderr=os.pread(stderr, most, 0)[-2000:].decode("utf-8", "replace"),
        evidence=os.pread(evidence, 64, 0),
        timed_out=timed_out,
    )
    for file in files:
        os.close(file)
    return outcome


def _end_the_rest() -> None:
    """Whatever the program started and left."""
    if os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all of the namespace but this process
    while True:
        if os.getpid() != 1:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# ---------------------------------------------------------------------------------------------- the program


def _become_program(
    program: Program, folder: str, files: list[int], seconds: float, limits: Limits, place: _Place
) -> None:
    """In the forked child; never returns."""
    try:
        os.setsid()
        for target, file in enumerate([os.dup(file) for file in files]):
            os.dup2(file, target)
        os.closerange(FIRST_FREE_FD, 1 << 20)
        os.chdir(folder)
        _limit(seconds, limits)
        if place.user is not None:
            isolation.become(place.user)
        isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user would have undone it
        isolation.prctl(isolation.PR_SET_NO_NEW_PRIVS, 1)
        arguments = [place.interpreter, "-I", "-S", "-X", "utf8", *program.arguments]
        os.execve(place.interpreter, arguments, {})
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(127)


def _limit(seconds: float, limits: Limits) -> None:
    values = {
        resource.RLIMIT_CPU: int(seconds) + 2,
        resource.RLIMIT_AS: limits.memory_mb * MIB,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_FSIZE: limits.file_mb * MIB,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in values.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def main(arguments: Sequence[str]) -> None:
    """``python -m megatron_vespo.rewards.sandbox PROTECTION INTERPRETER``: tries it, and says what is wrong."""
    protection, interpreter = arguments
    program = Program(arguments=("trial.py",), files=(("trial.py", "print('works')"),))
    try:
        (outcome,) = run_programs([program], Limits(), protection, interpreter)  # type: ignore[arg-type]
    except OSError as error:
        sys.exit(str(error))
    if outcome.stdout != "works\n":
        sys.exit(f"a trial program ended with exit code {outcome.exit_code}: {outcome.stderr.strip()}")


if __name__ == "__main__":
    main(sys.argv[1:])
