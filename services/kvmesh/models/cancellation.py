"""How work on a model is given up from another thread, also while it waits for a byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmesh.models.progress import Progress


class LoadCancelledError(Exception):
    """The work was given up. Nothing is wrong with the model."""


class Cancellation:
    """Passed to what takes long; whoever wants it to end calls `cancel`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._breaks: dict[object, Callable[[], object]] = {}

    def cancel(self) -> None:
        """Breaks what the work waits for. Returns at once, the work ends after it."""
        with self._lock:
            self._cancelled = True
            # What was begun last is broken first: what it wrote lies in what was begun before.
            while self._breaks:
                self._breaks.popitem()[1]()

    def check(self) -> None:
        """Raises `LoadCancelledError` where the work is given up."""
        if self._cancelled:
            raise LoadCancelledError

    @contextmanager
    def breaks(self, wait: Callable[[], object]) -> Iterator[None]:
        """Inside, `cancel` calls this, on its own thread: it may be called for something that
        has just ended, must not block, and raises nothing. What breaks by it is not told
        apart from other failures: a `check` comes after."""
        key = object()
        with self._lock:
            self.check()
            self._breaks[key] = wait
        try:
            yield
        finally:
            # One that is being called is waited for: what it closes may be closed after.
            with self._lock:
                self._breaks.pop(key, None)

    def checked(self, progress: Progress) -> Progress:
        """Progress after each piece of which the work may be given up."""

        def told(step: str, done: int, total: int | None) -> None:
            self.check()
            progress(step, done, total)

        return told
