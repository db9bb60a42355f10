"""How a child tells its parent what it does: lines on a descriptor of their own.

`kvmesh up` gives each child a pipe (KVMESH_ANNOUNCE_FD). Without one, lines go
to standard output.
"""

from __future__ import annotations

import os
from collections.abc import Callable

ANNOUNCE_FD = "KVMESH_ANNOUNCE_FD"


def announcer() -> Callable[[str], None]:
    """Where this process says its milestones."""
    descriptor = os.environ.pop(ANNOUNCE_FD, "")
    if not descriptor:

        def to_stdout(line: str) -> None:
            print(line, flush=True)

        return to_stdout
    number = int(descriptor)
    os.set_inheritable(number, False)

    def to_parent(line: str) -> None:
        os.write(number, line.replace("\n", " ").encode() + b"\n")

    return to_parent
