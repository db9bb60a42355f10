"""Starts a program that ends when its parent does, even by kill -9.

    python -SE tether.py PARENT_PID PROGRAM ARGUMENTS...

On Linux: asks the kernel for SIGKILL on the parent's death
(PR_SET_PDEATHSIG), then becomes the program by exec, which keeps that. This
runs in a fresh interpreter between fork and exec, not in a `preexec_fn`, which
may deadlock where the parent has threads (gRPC does). The parent may have died
before the kernel was asked: then its place as parent is somebody else's, which
is looked at after the asking, so no order of events slips through.

The kernel counts the *thread* that started the child as its parent; kvmesh
starts children from its main thread only.

Elsewhere: stays between the two, and ends the program when the pipe on standard
input, which only the parent can write to, closes.

Run by path and without site: importing the package would cost a second.
"""

import os
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Becomes or guards the program."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    # Set by a shell's `nohup` or a parent that ignores it; children do not.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        _tie_to_parent(parent)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            # As shells do.
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            return 127 if isinstance(error, FileNotFoundError) else 126
    return _guard(command)


def _tie_to_parent(parent: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("the parent has gone")


def _guard(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: child.send_signal(number))

    def wait_for_parent() -> None:
        while os.read(0, 1):
            pass
        child.kill()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
