"""Runs a program that dies with its parent.

`python -m kvmesh.cli.launch PARENT_PID PROGRAM ARGS…`: asks the kernel for
SIGKILL at the parent's death (PR_SET_PDEATHSIG, kept over exec), checks that
the parent did not die before that, and becomes the program. So also a parent
killed by `kill -9` leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Never returns."""
    parent, program, *arguments = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")
    if os.getppid() != int(parent):
        sys.exit("the parent is gone")
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
