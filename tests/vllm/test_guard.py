"""What vLLM has started ends with its worker, however that ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmesh.engine.vllm import engine

GUARD = Path(engine.__file__).with_name("guard.py")
WAITS = "import sys; print('up', flush=True); sys.stdin.read()"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="environments are read from /proc")


def waiting(**variables):
    """A process that waits, as an engine core does."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **variables},
    )
    process.stdout.readline()
    return process


def test_what_carries_the_mark_is_killed_and_nothing_else(tmp_path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    (folder / "events").touch()
    ours, other = waiting(KVMESH_ENGINE_OF="a1"), waiting(KVMESH_ENGINE_OF="a2")
    try:
        guard = subprocess.Popen(
            [sys.executable, "-SE", str(GUARD), "KVMESH_ENGINE_OF=a1", str(folder)],
            stdin=subprocess.PIPE,
        )
        assert ours.poll() is None
        # The worker has gone, and with it the pipe's only other end.
        guard.stdin.close()
        assert guard.wait(10) == 0
        assert ours.wait(10) == -9
        assert other.poll() is None
        assert not folder.exists()
    finally:
        for process in (ours, other):
            process.kill()
            process.communicate()


def test_a_guard_takes_its_mark_out_of_its_own_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SPT_NOENV", "1")
    folder = tmp_path / "sockets"
    folder.mkdir()
    guard = engine.Guard(folder)
    core = waiting()
    guard.close()
    assert core.wait(10) == -9, "what was started after the guard carries the mark"
    core.communicate()
    assert not folder.exists()
    assert "KVMESH_ENGINE_OF" not in os.environ
