"""Runs a command as the parent's shadow: when the parent dies, the whole session of the command is killed.

Run by file path (``python guard.py PARENT_PID COMMAND ...``), so it imports nothing of ours. The kernel's own
parent-death signal would not do alone: it fires when the *thread* that started the child ends, and it stops at the
direct child.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

POLL_S = 0.2
GRACE_S = 5.0
PR_SET_PDEATHSIG = 1


def main() -> int:
    parent = int(sys.argv[1])
    # The group gets SIGTERM as one; the guard leaves after its child, so that the exit code is the child's.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(sys.argv[2:], preexec_fn=_restore_and_tie)
    while (code := child.poll()) is None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            os.killpg(0, signal.SIGKILL)
        time.sleep(POLL_S)
    return code if code >= 0 else 128 - code


def _restore_and_tie() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
