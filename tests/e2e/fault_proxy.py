"""The testkit's TCP fault proxy before a worker, controlled by lines of text."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType

from kvmesh.cli.children import tethered

ROOT = Path(__file__).parents[2]


@cache
def testkit() -> str:
    """The testkit's binary, built here."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    chosen = ["--workspace", "--exclude", "kvmesh-python", "--bin", "kvmesh-testkit"]
    subprocess.run(["cargo", "build", "--release", *chosen], cwd=ROOT, check=True)
    return str(target / "release" / "kvmesh-testkit")


class FaultProxy:
    """Passes connections on to `upstream`; a context manager. For the main thread."""

    def __init__(
        self,
        upstream: str,
        listen: str = "127.0.0.1:0",
        within: Callable[..., list[str]] = lambda *command: [*command],
    ) -> None:
        """`within`: makes the command line that runs a command where the proxy is to be."""
        command = [testkit(), "fault-proxy", "--listen", listen, "--upstream", upstream]
        self._process = subprocess.Popen(
            tethered(within(*command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address: str = self._answer()["address"]
        """Where it listens."""

    def tell(self, *lines: str) -> None:
        """Controls it, as `kvmesh-testkit fault-proxy --help` says; in force on return."""
        for line in (*lines, "connections"):
            self._say(line)
        self._answer()

    def connections(self) -> int:
        """Connections open now."""
        self._say("connections")
        return int(self._answer()["connections"])

    def _say(self, line: str) -> None:
        if self._process.stdin is None:
            raise AssertionError("it was started with a pipe")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, object]:
        if self._process.stdout is None:
            raise AssertionError("it was started with a pipe")
        line = self._process.stdout.readline()
        assert line, "the fault proxy has ended"
        answer: dict[str, object] = json.loads(line)
        return answer

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
