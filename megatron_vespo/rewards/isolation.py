"""Namespaces of the Linux kernel around a process: no network, no other processes, no files but what is named.

Plain system calls, through the C library: Python has os.unshare from 3.12 on only, and no mount at all. Everything
here changes the calling process for good: call it in a process forked for that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET."""
NEW_USER = 0x10000000
READ_ONLY, NO_SETUID, NO_DEVICES = 0x1, 0x2, 0x4
"""MS_* and MOUNT_ATTR_* have the same values here."""
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000
DETACH = 0x2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
NOBODY = 65534
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
DEVICES = ("null", "zero", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace"))


def enter_namespaces() -> None:
    """New namespaces for network, mounts, processes (those forked from now on), IPC and host name.

    An ordinary user gets a user namespace of its own first. Raises OSError where the kernel does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _checked("unshare", _libc.unshare(NEW_NAMESPACES))
        return
    _checked("unshare", _libc.unshare(NEW_NAMESPACES | NEW_USER))
    # Not 0 inside: so the programs lose the capabilities of the namespace at exec.
    for name, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        Path("/proc/self", name).write_text(line)


def enter_root(readable: Sequence[str], size_mb: int) -> None:
    """A root of memory, in which there are the system's programs and ``readable``, read-only, four devices, and one
    writable folder, /work (also /tmp), of ``size_mb``. No /proc. Raises OSError."""
    mount(None, "/", None, PRIVATE | RECURSIVE)
    mount("tmpfs", "/tmp", "tmpfs", NO_SETUID | NO_DEVICES, "mode=0755,size=1m")
    os.mkdir("/tmp/outside")
    os.chdir("/tmp")
    if os.uname().machine not in PIVOT_ROOT:
        raise OSError(f"pivot_root is not known for {os.uname().machine}")
    _checked("pivot_root", _libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"outside"))
    os.chdir("/")
    inside = {path for path in readable if not Path(path).is_relative_to("/usr")}
    for path in (*SYSTEM, *sorted(inside)):
        _show(path)
    os.mkdir("/dev")
    for name in DEVICES:
        Path("/dev", name).touch()
        mount(f"/outside/dev/{name}", f"/dev/{name}", None, BIND)
    os.mkdir("/work")
    mount("tmpfs", "/work", "tmpfs", NO_SETUID | NO_DEVICES, f"mode=0777,size={size_mb}m,nr_inodes=4096")
    os.symlink("/work", "/tmp")
    _checked("umount", _libc.umount2(b"/outside", DETACH))
    os.rmdir("/outside")
    _restrict("/", READ_ONLY, recursive=False)


def _show(path: str) -> None:
    """``path`` of the old root at the same place of the new one, read-only."""
    source = Path("/outside" + path)
    if source.is_symlink() and path in SYSTEM:
        os.symlink(os.readlink(source), path)
    elif source.is_dir():
        os.makedirs(path, exist_ok=True)
        mount(str(source), path, None, BIND | RECURSIVE)
        _restrict(path, READ_ONLY | NO_SETUID | NO_DEVICES, recursive=True)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    returned = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _checked(f"mount on {target}", returned)


def _restrict(path: str, attributes: int, recursive: bool) -> None:
    """mount_setattr (Linux 5.12), and not a remount: that would leave mounts below ``path`` as they are."""
    change = _MountAttributes(set=attributes)
    flags = AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(ctypes.sizeof(change))
    _checked(
        f"mount_setattr of {path}",
        _libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(change), size),
    )


def prctl(option: int, value: int) -> None:
    _checked("prctl", _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def program_user() -> int | None:
    """The user that programs run as where this process is root: one that owns nothing, another for each process, so
    that limits on its processes are its own. None: not root, they run as this user."""
    if os.geteuid() != 0:
        return None
    first, _, count = (int(number) for number in Path("/proc/self/uid_map").read_text().split("\n")[0].split())
    return 2_000_000_000 + os.getpid() if first == 0 and count > 2_100_000_000 else NOBODY


def become(user: int) -> None:
    """For good, with no group and no capability left."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _checked(what: str, returned: int) -> None:
    if returned != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if sys.platform != "linux":
    raise ImportError("the sandbox of the reward `code` needs Linux")
