"""What the engine thread says to the event loop: steps, cache changes."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Outbox(Generic[Item]):
    """One writer on a thread, one reader on an event loop.

    However many items come while the loop is busy, it is called once. A full
    box makes `wait_for_room` wait: an engine that outruns its event loop stops.
    """

    def __init__(self, capacity: int, *, keeps_unread: bool = True) -> None:
        """`keeps_unread` False: until somebody begins to read, only the newest
        items are kept, and nobody waits for room."""
        self._capacity = capacity
        self._keeps_unread = keeps_unread
        self._items: deque[Item] = deque()
        self._called = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._room = threading.Event()
        self._room.set()
        self._closed = False

    def put(self, item: Item) -> None:
        """Adds an item. Never waits."""
        self._items.append(item)
        if len(self._items) >= self._capacity:
            if self._loop is None and not self._keeps_unread:
                self._items.popleft()
            else:
                self._room.clear()
        self._call()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Waits while the box is full. False: it still is."""
        if len(self._items) * 2 <= self._capacity:
            # The reader may have emptied the box while `put` found it full.
            self._room.set()
        return self._room.is_set() or self._closed or self._room.wait(timeout_s)

    def close(self) -> None:
        """Ends the reader once it has read everything."""
        self._closed = True
        self._room.set()
        self._call()

    def _call(self) -> None:
        if self._called or self._loop is None or self._wake is None:
            return
        self._called = True
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:
            # The loop is closed: nobody reads any more.
            self._closed = True
            self._room.set()

    async def read(self) -> AsyncIterator[Item]:
        """Items in order, until `close`. One reader at a time."""
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            self._called = False
            while self._items:
                item = self._items.popleft()
                if not self._room.is_set() and len(self._items) * 2 <= self._capacity:
                    self._room.set()
                yield item
            if self._closed:
                return
            # An item that came before `_called` was cleared is seen here.
            if not self._items:
                await self._wake.wait()
