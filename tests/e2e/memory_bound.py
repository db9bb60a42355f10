"""A bound on the memory of a process, kept by the kernel: a control group of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

_ROOT = Path("/sys/fs/cgroup")


class MemoryBound:
    """A group whose processes the kernel kills where they want more; a context manager.

    What a process has already stays counted where it was. Needs root, and control groups of
    version 1 or 2.
    """

    def __init__(self, more_bytes: int) -> None:
        first = _ROOT / "memory"
        self._second = not first.is_dir()
        name = f"kvmesh-test-{os.getpid()}-{time.monotonic_ns()}"
        self._folder = (_ROOT if self._second else first) / name
        if self._second:
            (_ROOT / "cgroup.subtree_control").write_text("+memory")
        self._folder.mkdir()
        limit = "memory.max" if self._second else "memory.limit_in_bytes"
        (self._folder / limit).write_text(str(more_bytes))

    def hold(self, process: int) -> None:
        """From now on what the process takes counts here."""
        (self._folder / "cgroup.procs").write_text(str(process))

    def kills(self) -> int:
        """Processes that the kernel has killed for their memory."""
        told = self._folder / ("memory.events" if self._second else "memory.oom_control")
        rows = (line.split() for line in told.read_text().splitlines())
        return next(int(row[1]) for row in rows if row[0] == "oom_kill")

    def __enter__(self) -> MemoryBound:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Who lives still goes back to where everybody is.
        for process in (self._folder / "cgroup.procs").read_text().split():
            (self._folder.parent / "cgroup.procs").write_text(process)
        self._folder.rmdir()
