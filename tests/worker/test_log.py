"""A worker's log says what its native code has to say, and where its registration stands."""

import logging
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime

from kvmesh.cli.children import Children
from kvmesh.cli.etcd import etcd_command, free_ports
from kvmesh.worker.registration import tell_changes
from kvmesh.worker.settings import WorkerSettings

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z +(ERROR|WARN|INFO|DEBUG) \S+: .*")
COMMAND = (sys.executable, "-m", "kvmesh.cli", "worker", "--engine", "sim", "--model", "sim")


@contextmanager
def worker(*arguments):
    """Runs a worker; a function that waits for a line of its log with given words."""
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:

        def said(words: str) -> str:
            return next(line.rstrip("\n") for line in process.stderr if words in line)

        try:
            yield said
        finally:
            process.terminate()
            # Nobody reads on: what it still says has to have room.
            process.communicate()


def test_etcd_that_is_away_and_comes_back_is_told(tmp_path) -> None:
    client, peer = free_ports([0, 0])
    where = f"127.0.0.1:{client}"
    with worker("--etcd", where, "--worker-id", "w") as said:
        native = said("kvmesh_registry::registration")
        told = said("kvmesh.worker.registration: not registered")
        assert LINE.fullmatch(told)
        assert LINE.fullmatch(native)
        assert f"setting etcd is '{where}', of which none can be had: etcd cannot be" in told
        with Children(tmp_path / "logs", lambda name, line: None) as children:
            children.spawn("etcd", etcd_command(client, peer, tmp_path / "data", durable=False))
            assert " INFO kvmesh.worker.registration: registered again" in said("registered again")


def test_a_level_holds_for_native_lines_too() -> None:
    (port,) = free_ports([0])
    with worker("--etcd", f"127.0.0.1:{port}", "--log-level", "error") as said:
        # The native warning of the same event comes before it.
        first = said("")
        assert " ERROR kvmesh.worker.registration: not registered" in first


class Changing:
    """A registration that goes through given states."""

    def __init__(self, *states: tuple[str, str]) -> None:
        self._states = iter(states)

    def wait_change(self, state: str, reason: str) -> tuple[str, str]:
        return next(self._states)


async def test_each_change_of_a_registration_is_a_line(caplog) -> None:
    settings = WorkerSettings(etcd=("a:1", "b:1"), cluster="c", etcd_ttl=7.0)
    registration = Changing(
        ("registering", ""), ("registered", ""), ("registering", ""),
        ("refused", "w is taken: x:1 is registered"), ("registered", ""), ("away", "cut"),
        ("registering", ""), ("registered", ""), ("closed", ""),
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        await tell_changes(registration, settings)
    lines = [(line.levelname, line.getMessage().split(";")[0]) for line in caplog.records]
    about = "etcd=a:1,b:1 cluster=c"
    assert lines == [
        ("INFO", f"registering {about}"),
        ("INFO", f"registered {about}"),
        ("INFO", f"registering {about}"),
        ("ERROR", "not registered: setting worker_id is refused: w is taken: x:1 is registered"),
        ("INFO", f"registered again {about}"),
        ("ERROR", "not registered: setting etcd is 'a:1,b:1', of which none can be had: cut"),
        ("INFO", f"registering {about}"),
        ("INFO", f"registered again {about}"),
    ]
    assert "tried again every etcd_ttl (7 s)" in caplog.text


def test_the_lines_of_python_and_of_native_code_have_one_form() -> None:
    """And the times of both are UTC."""
    code = "from kvmesh.worker.log import start_logging; import logging; start_logging('debug');"
    code += "logging.getLogger('a').warning('x'); logging.getLogger('b').debug('y')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TZ": "Asia/Tokyo"},
    )
    first, second = done.stderr.splitlines()
    assert LINE.fullmatch(first)[1] == "WARN"
    assert LINE.fullmatch(second)[1] == "DEBUG"
    told = datetime.fromisoformat(first.split()[0])
    assert abs((datetime.now(UTC) - told).total_seconds()) < 3600
