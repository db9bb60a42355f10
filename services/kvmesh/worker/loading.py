"""What takes long before a worker serves, and how it ends when the worker is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from kvmesh.models import Cancellation, LoadCancelledError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_UNWIND_S = 1.0
"""Time that work which was given up has to end by itself. What cannot be broken (a name that
is looked up, weights that are copied, an engine that warms up) may take minutes."""


class StoppedError(Exception):
    """The worker was told to stop before it served."""


class Loading:
    """Work on threads of its own. Those of the event loop's executor are waited for when a
    process ends, whatever they do."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.left = False
        """A thread is still at work of which nobody wants the result."""

    async def run(self, stopped: asyncio.Future[None], work: Callable[[], _T]) -> _T:
        """What the work returns or raises. Raises `StoppedError` where `stopped` came first
        and the work has not ended a moment later; what it has made by then is returned."""
        if stopped.done():
            raise StoppedError
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()

        def whole() -> None:
            try:
                tell: Callable[[], None] = partial(done.set_result, work())
            except BaseException as error:
                tell = partial(done.set_exception, error)

            def settle() -> None:
                if not done.cancelled():
                    tell()

            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:
                # The loop has ended before: whoever left this thread told so.
                _log.info("what was left at work has ended: %s", tell)

        threading.Thread(target=whole, name="loading", daemon=True).start()
        either: list[asyncio.Future[Any]] = [done, stopped]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            await asyncio.to_thread(self.cancellation.cancel)
            await asyncio.wait([done], timeout=_UNWIND_S)
        if not done.done():
            done.cancel()
            self.left = True
            raise StoppedError
        try:
            return done.result()
        except LoadCancelledError as error:
            raise StoppedError from error

    def leave(self, status: int) -> None:
        """Ends the process where a thread was left at work: the interpreter cannot be taken
        down around one that may be in the middle of native code."""
        if self.left:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
