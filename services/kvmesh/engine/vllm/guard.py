"""Ends what a worker's vLLM has started when the worker has gone, even by kill -9.

    python -SE guard.py NAME=VALUE FOLDER

Waits for the end of standard input, which only the worker can write to, and then
kills every process that has this variable in its environment: vLLM's engine core
and the processes that compute for it inherit it, whoever their parent is by then.
A worker that ends in order leaves none. The folder, which has the sockets of its
cache events, goes with them.
"""

import os
import shutil
import signal
import sys
from pathlib import Path


def marked(mark: bytes) -> list[int]:
    """Processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            # It has ended, or is somebody else's.
            continue
        if mark in environment.split(b"\0"):
            found.append(int(folder.name))
    return found


def main() -> None:
    """Waits, then kills and removes."""
    mark = sys.argv[1].encode()
    # A terminal's interrupt is the worker's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.read(0, 64):
        pass
    for process in marked(mark):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    shutil.rmtree(sys.argv[2], ignore_errors=True)


if __name__ == "__main__":
    main()
