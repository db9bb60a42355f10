"""Changes of the prefix cache, as routers' indexes follow them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmesh.engine.contract import CacheBatch
from kvmesh.v1 import worker_pb2 as wire

RUN_BLOCKS = 4096
"""Most blocks of one event (contract.Engine.snapshot)."""

ChainHashes = Callable[[int, bytes], Sequence[int]]
"""(parent value, ids as u32 little-endian) -> value after each 16 ids (hash scheme 1)."""

ChainRoot = Callable[[str, str], int]
"""(adapter's name, cache salt) -> chain value that first blocks have as parent."""


class CacheJournal:
    """Collects changes in order and numbers them. Neighbours become runs."""

    def __init__(self) -> None:
        self.last_event = 0
        """Number of the last change that was drained."""
        self._events: list[wire.CacheEvent] = []
        self._stored: list[int] = []
        self._stored_parent = 0
        self._removed: list[int] = []

    def stored(self, parent: int, chain: int) -> None:
        """A block became full and can be shared."""
        if self._removed:
            self._close_run()
        run = self._stored
        if run and (run[-1] != parent or len(run) >= RUN_BLOCKS):
            self._close_run()
        if not self._stored:
            self._stored_parent = parent
        self._stored.append(chain)

    def removed(self, chain: int) -> None:
        """A block is gone."""
        if self._stored or len(self._removed) >= RUN_BLOCKS:
            self._close_run()
        self._removed.append(chain)

    def drain(self) -> CacheBatch | None:
        """Everything since the last call; None: nothing."""
        self._close_run()
        if not self._events:
            return None
        batch = CacheBatch(self.last_event + 1, self._events)
        self.last_event += len(self._events)
        self._events = []
        return batch

    def _close_run(self) -> None:
        if self._stored:
            run = wire.BlocksStored(parent=self._stored_parent, chain=self._stored)
            self._events.append(wire.CacheEvent(stored=run))
            self._stored = []
        if self._removed:
            gone = wire.BlocksRemoved(chain=self._removed)
            self._events.append(wire.CacheEvent(removed=gone))
            self._removed = []
