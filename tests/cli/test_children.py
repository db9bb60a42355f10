"""Children live as long as their parent, and not longer."""

import os
import selectors
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvmesh.cli.children import ChildDiedError, Children, tethered

# Says that it is there, then waits to be ended.
WAITING = "import sys, os, signal; os.write(int(sys.argv[-1]), b'up\\n'); signal.pause()"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def children(tmp_path: Path, said: list[tuple[str, str]]) -> Children:
    return Children(tmp_path, lambda name, line: said.append((name, line)))


def test_progress_is_told_and_the_end_ends_all(tmp_path):
    said = []
    with children(tmp_path, said) as running:
        first = running.spawn("first", python(WAITING), announce=True)
        second = running.spawn("second", python(WAITING), announce=True)
        running.wait_for(first, "up")
        running.wait_for(second, "up")
    assert sorted(said) == [("first", "up"), ("second", "up")]
    assert first.process.returncode == -signal.SIGTERM
    assert second.process.returncode == -signal.SIGTERM


def test_one_that_does_not_listen_is_killed(tmp_path):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAITING
    running = children(tmp_path, [])
    child = running.spawn("deaf", python(code), announce=True)
    running.wait_for(child, "up")
    running.stop_all(grace_s=0.2)
    assert child.process.returncode == -signal.SIGKILL


def test_an_early_death_is_told_with_the_end_of_the_log(tmp_path):
    with children(tmp_path, []) as running:
        child = running.spawn("broken", python("print('the reason'); raise SystemExit(3)"))
        with pytest.raises(ChildDiedError, match=r"(?s)broken ended with status 3.*the reason"):
            running.wait_for(child, "up")


def test_a_command_that_is_not_there_is_told(tmp_path):
    with children(tmp_path, []) as running:
        child = running.spawn("none", ["/nowhere/etcd"])
        with pytest.raises(ChildDiedError, match="No such file"):
            running.wait_for(child, "up")


PARENT = textwrap.dedent("""
    import os, pathlib, sys
    from kvmesh.cli.children import Children
    running = Children(pathlib.Path(sys.argv[1]), lambda name, line: None)
    code = sys.argv[2]
    for number in range(3):
        child = running.spawn(str(number), [sys.executable, "-c", code], announce=True)
        running.wait_for(child, "up")
        print(child.process.pid, flush=True)
    sys.stdin.read()
""")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_children_die_with_a_parent_that_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), WAITING],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = [int(parent.stdout.readline()) for _ in range(3)]
    descriptors = [os.pidfd_open(pid) for pid in pids]
    parent.kill()
    parent.wait()
    with selectors.DefaultSelector() as ended:
        for descriptor in descriptors:
            ended.register(descriptor, selectors.EVENT_READ)
        gone = set()
        while len(gone) < 3:
            # A generous bound that only a failure reaches.
            ready = ended.select(timeout=30)
            assert ready, "a child outlived its parent"
            for key, _ in ready:
                gone.add(key.fd)
                ended.unregister(key.fd)
    for descriptor in descriptors:
        os.close(descriptor)
    parent.stdin.close()
    parent.stdout.close()


def test_a_parent_that_was_gone_before_is_noticed():
    # Not our parent's number: as if it had died before the kernel was asked.
    command = tethered([sys.executable, "-c", "print('ran')"])
    command[3] = "1"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "parent has gone" in done.stderr
