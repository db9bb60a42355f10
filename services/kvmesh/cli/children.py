"""Child processes that live as long as this one.

Children are spawned, never forked Python. Each has a log file for all it prints
and the write end of a pipe: what it says there is its progress, and the pipe's
end is its death. So one `select` waits for everything, without a clock.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType

_TETHER = Path(__file__).with_name("tether.py")
_TAIL_LINES = 20


def tethered(command: Sequence[str]) -> list[str]:
    """A command line whose process ends when this one does."""
    return [sys.executable, "-SE", str(_TETHER), str(os.getpid()), *command]


class ChildDiedError(Exception):
    """A child ended that should not have. The text has the end of its log."""


@dataclass(eq=False)
class Child:
    """A running child."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    pipe: int
    """Read end of the pipe that only the child can write to."""
    said: list[str] = field(default_factory=list)
    """Lines of the pipe so far."""
    unfinished: bytes = b""

    def tail(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])
        return ""

    def describe_end(self) -> str:
        """How it ended, for people."""
        status = self.process.returncode
        if status is None:
            how = "closed its pipe"
        elif status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        else:
            how = f"ended with status {status}"
        tail = self.tail()
        return f"{self.name} {how}" + (f"; the end of {self.log}:\n{tail}" if tail else "")


class Children:
    """Starts children and ends them all; a context manager.

    Use it from the main thread: the kernel ties a child to the thread that
    started it (tether.py).
    """

    def __init__(self, logs: Path, say: Callable[[str, str], None]) -> None:
        """`logs`: folder for log files. `say`: gets (child, line) of progress."""
        self._logs = logs
        self._say = say
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._ends: list[int] = []
        logs.mkdir(parents=True, exist_ok=True)

    def spawn(
        self,
        name: str,
        command: Sequence[str],
        *,
        announce: bool = False,
        environment: Mapping[str, str] | None = None,
        hidden: Collection[str] = (),
    ) -> Child:
        """Starts a child. `announce`: it takes --announce-fd and tells its progress.

        `environment`: variables besides those of this process, of which it does not
        get the `hidden` ones.
        """
        read_end, write_end = os.pipe()
        log = self._logs / f"{name}.log"
        arguments = tethered(command)
        if announce:
            arguments += ["--announce-fd", str(write_end)]
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    arguments,
                    stdin=self._standard_input(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_end,),
                    env={
                        **{k: v for k, v in os.environ.items() if k not in hidden},
                        **(environment or {}),
                    },
                    # Ctrl-C goes to this process alone, which ends the
                    # children in order.
                    process_group=0,
                )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)
        child = Child(name, process, log, read_end)
        self._children.append(child)
        self._selector.register(read_end, selectors.EVENT_READ, child)
        return child

    def _standard_input(self) -> int:
        if sys.platform == "linux":
            return subprocess.DEVNULL
        # The pipe that tells a guard of our death: never written to.
        read_end, write_end = os.pipe()
        self._ends += [read_end, write_end]
        return read_end

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until a child says something, or for a time.

        Raises `ChildDiedError` where one has ended.
        """
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, Child):
                self._read(key.data)

    @contextlib.contextmanager
    def watching(self, process: subprocess.Popen[bytes]) -> Iterator[Callable[[], bool]]:
        """While inside, `wait` returns also when this other process has ended.

        Gives a function that says whether it has.
        """
        read_end, write_end = os.pipe()

        def wait_for_end() -> None:
            process.wait()
            os.close(write_end)

        waiting = threading.Thread(target=wait_for_end, name="command", daemon=True)
        self._selector.register(read_end, selectors.EVENT_READ)
        waiting.start()
        try:
            yield lambda: process.returncode is not None
        finally:
            self._selector.unregister(read_end)
            os.close(read_end)

    def wait_for(self, child: Child, prefix: str, until: float | None = None) -> str:
        """Waits for a line with a prefix; what follows the prefix.

        `until`: a time of `time.monotonic`; raises `TimeoutError` when it comes first.
        """
        while True:
            for line in child.said:
                if line.startswith(prefix):
                    return line[len(prefix) :].strip()
            left = None if until is None else until - monotonic()
            if left is not None and left <= 0:
                last = f"; it said last: {child.said[-1]}" if child.said else ""
                raise TimeoutError(f"{child.name} has not said {prefix.strip()!r}{last}")
            self.wait(left)

    def _read(self, child: Child) -> None:
        data = os.read(child.pipe, 65_536)
        if not data:
            # The pipe closes a moment before the process can be waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=5)
            self._selector.unregister(child.pipe)
            raise ChildDiedError(child.describe_end())
        *lines, child.unfinished = (child.unfinished + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            child.said.append(text)
            self._say(child.name, text)

    def stop(self, child: Child, grace_s: float) -> None:
        """Ends one child: asks, waits, kills."""
        if child not in self._children:
            return
        if child.process.poll() is None:
            child.process.terminate()
        try:
            child.process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        self._children.remove(child)
        # Not there any more where its end was already read.
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.pipe)
        os.close(child.pipe)

    def stop_all(self, grace_s: float = 10.0) -> None:
        """Ends all, the last started first; each within what is left of the grace.

        All but the first are asked at once: those that were started first (etcd)
        serve the others until these have gone.
        """
        until = monotonic() + grace_s
        remaining = list(reversed(self._children))
        for child in remaining[:-1]:
            if child.process.poll() is None:
                child.process.terminate()
        for child in remaining:
            self.stop(child, max(0.1, until - monotonic()))
        for end in self._ends:
            os.close(end)
        self._ends.clear()

    def kill_all(self) -> None:
        """Ends all at once."""
        for child in self._children:
            if child.process.poll() is None:
                child.process.kill()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop_all()
        except BaseException:
            # A second Ctrl-C: no more patience.
            self.kill_all()
            raise
        finally:
            self._selector.close()
