"""Children are told apart, listened to, ended in order, and never left behind."""

import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from kvmesh.cli.children import Children
from kvmesh.cli.errors import CommandError

ANNOUNCE = "import os; w = os.fdopen(int(os.environ['KVMESH_ANNOUNCE_FD']), 'w', 1);"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for_end(pid: int, seconds: float = 30) -> bool:
    """Whether a process ends; it need not be a child of ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def test_lines_reach_the_parent_with_the_name_of_the_child(tmp_path) -> None:
    heard = []
    with Children(tmp_path, lambda name, line: heard.append((name, line))) as children:
        code = ANNOUNCE + "print('a: serving on x', file=w); import signal; signal.pause()"
        child = children.start("one", python(code))
        children.wait_until(lambda: bool(child.lines), 30, "hearing")
        pid = child.process.pid
    assert heard == [("one", "a: serving on x")]
    assert wait_for_end(pid, 0)


def test_a_child_that_dies_is_told_with_the_end_of_its_log(tmp_path) -> None:
    with Children(tmp_path, lambda *_: None) as children:
        children.start("bad", python("import sys; sys.exit('no such model: x')"))
        with pytest.raises(CommandError, match=r"bad ended with status 1[\s\S]*no such model: x"):
            children.wait_until(lambda: False, 30, "starting")


def test_a_child_that_ignores_the_end_is_killed(tmp_path) -> None:
    code = (
        ANNOUNCE + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', file=w); [signal.pause() for _ in range(9)]"
    )
    with Children(tmp_path, lambda *_: None) as children:
        child = children.start("deaf", python(code))
        children.wait_until(lambda: bool(child.lines), 30, "hearing")
        children.stop_all(grace_s=0.2)
        assert child.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_the_parent_however_it_ends(tmp_path, number) -> None:
    parent = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from kvmesh.cli.children import Children, Interrupted
        with Children(Path({str(tmp_path)!r}), lambda *_: None) as children:
            code = {ANNOUNCE + "print(os.getpid(), file=w); import signal; signal.pause()"!r}
            child = children.start("one", [sys.executable, "-c", code])
            children.wait_until(lambda: bool(child.lines), 30, "hearing")
            print(child.lines[0], flush=True)
            try:
                children.handle(None)
            except Interrupted as stop:
                print(stop.number, flush=True)
        """
    )
    process = subprocess.Popen(python(parent), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child_pid = int(process.stdout.readline())
    process.send_signal(number)
    assert wait_for_end(child_pid)
    rest = process.stdout.read()
    status = process.wait(30)
    process.stdout.close()
    if number is signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert (rest.strip(), status) == (str(int(number)), 0)
