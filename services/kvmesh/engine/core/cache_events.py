"""Changes of the prefix cache, as routers' indexes follow them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmesh.engine.contract import CLEARED, REMOVED, STORED, CacheBatch, CacheChange

RUN_BLOCKS = 4096
"""Most blocks of one event (contract.CacheChange)."""

ChainHashes = Callable[[int, bytes], Sequence[int]]
"""(parent value, ids as u32 little-endian) -> value after each 16 ids (hash scheme 1)."""

ChainRoot = Callable[[str, str], int]
"""(adapter's name, cache salt) -> chain value that first blocks have as parent."""


class CacheJournal:
    """Collects changes in order and numbers them. Neighbours become runs."""

    def __init__(self) -> None:
        self.last_event = 0
        """Number of the last change that was drained."""
        self._changes: list[CacheChange] = []
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

    def cleared(self) -> None:
        """All blocks are gone."""
        self._close_run()
        self._changes.append(CacheChange(CLEARED, 0, ()))

    def drain(self) -> CacheBatch | None:
        """Everything since the last call; None: nothing."""
        if not (self._stored or self._removed or self._changes):
            return None
        self._close_run()
        batch = CacheBatch(self.last_event + 1, self._changes)
        self.last_event += len(self._changes)
        self._changes = []
        return batch

    def _close_run(self) -> None:
        if self._stored:
            self._changes.append(CacheChange(STORED, self._stored_parent, self._stored))
            self._stored = []
        if self._removed:
            self._changes.append(CacheChange(REMOVED, 0, self._removed))
            self._removed = []
