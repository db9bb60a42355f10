"""How a service tells the process that started it how far it is."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable


def add_announce(parser: argparse.ArgumentParser) -> None:
    """Adds the hidden flag that `kvmesh up` uses."""
    parser.add_argument("--announce-fd", type=int, default=None, help=argparse.SUPPRESS)


def announcer(fd: int | None) -> Callable[[str], None]:
    """Prints milestones, and writes them to a descriptor where one is given."""

    def announce(line: str) -> None:
        print(line, flush=True)
        if fd is not None:
            try:
                os.write(fd, line.encode() + b"\n")
            except BrokenPipeError:
                # Nobody listens any more; the log has the line.
                print("the starter is gone", file=sys.stderr)

    return announce
