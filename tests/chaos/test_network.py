"""A network of its own ends with the program, however that ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("chaos.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's namespaces")


def below(pid: int) -> list[int]:
    """All processes below one."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found[1:]


def test_nothing_is_left_of_a_program_that_is_killed(tmp_path) -> None:
    links, namespace = set(os.listdir("/sys/class/net")), os.readlink("/proc/self/ns/net")
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), "--kinds", "Unreachable", "--folder", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    with program.stdout:
        # Its first fault: all processes run, and rules are in force.
        assert any("fault" in line for line in program.stdout)
        assert os.readlink(f"/proc/{program.pid}/ns/net") != namespace
        ends = []
        for pid in below(program.pid):
            # One that only made a rule may be gone.
            with contextlib.suppress(ProcessLookupError):
                ends.append(os.pidfd_open(pid))
        assert len(ends) > 8
        program.send_signal(signal.SIGKILL)
        program.wait()
    for end in ends:
        # Readable once its process has ended, and with the last one the network goes.
        assert select.select([end], [], [], 60)[0], "a process is left"
        os.close(end)
    assert set(os.listdir("/sys/class/net")) == links
