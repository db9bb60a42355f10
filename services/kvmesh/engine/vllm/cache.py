"""vLLM's KV cache events, turned into ours.

vLLM names a block by a hash of its own and tells the token ids with it. From
these come the block's chain values (SCHEDULING 1): `ForeignNames` has the names,
this has the content that is left, so that a router that comes late can be told.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvmesh._router import ForeignNames
from kvmesh.engine.contract import STORED, CacheBatch, CacheChange
from kvmesh.engine.core.cache_events import CacheJournal

_log = logging.getLogger(__name__)

_DEVICE = (None, "GPU")
"""Media that are the device's own memory; vLLM's CPU build says GPU, too."""

_PART_BLOCKS = 1024
"""Blocks of one part of a snapshot."""

Batch = Sequence[Any]
"""A decoded payload: [time, events, rank]; events are maps with `type`."""


class VllmCache:
    """What is cached in one vLLM engine, as routers' indexes follow it.

    Written by the engine's thread. `holds` and `snapshot` may be called from any.
    """

    def __init__(self, root: Callable[[str, str], int], blocks: int, group: int = 0) -> None:
        """`root`: of (adapter's name, cache salt). `blocks`: of the pool; the names of some
        more are kept, since vLLM may hold one content in several."""
        self._root = root
        self._group = group
        self._names = ForeignNames(2 * blocks, group)
        self._content: dict[int, int] = {}
        """Parent value by value, oldest first."""
        self._lock = threading.Lock()
        self._journal = CacheJournal()

    def __len__(self) -> int:
        """Blocks of different content."""
        return len(self._content)

    # -- events ------------------------------------------------------------

    def hear(self, sequence: int) -> int | None:
        """A batch's number has come. None: `apply` it; its own number: it was heard before;
        a lower one: those from there on are missing."""
        heard, number = self._names.hear(sequence)
        return None if heard == "next" else number

    def apply(self, batch: Batch) -> None:
        """Takes a batch's events. What cannot be read is left out and said."""
        for event in batch[1]:
            try:
                self._apply(event)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                _log.warning("cache event not understood: %s", error)

    def _apply(self, event: Mapping[str, Any]) -> None:
        match event["type"]:
            case "BlockStored" if event.get("medium") in _DEVICE:
                self._stored(event)
            case "BlockRemoved" if event.get("medium") in _DEVICE:
                group = int(event.get("group_idx") or 0)
                for value in self._names.removed(event["block_hashes"], group=group):
                    self._forget(value)
            case "AllBlocksCleared":
                self.clear()

    def _stored(self, event: Mapping[str, Any]) -> None:
        adapter = event.get("lora_name") or ""
        keys = event.get("extra_keys") or []
        parent = event.get("parent_block_hash")
        salt, known = _salt(keys, adapter, first=parent is None)
        named = self._names.stored(
            self._root(adapter, salt),
            parent,
            event["block_hashes"],
            event["token_ids"],
            int(event["block_size"]),
            group=int(event.get("group_idx") or 0),
            extra_keys=not known,
        )
        if named is None:
            return
        before, chain, forgotten = named
        for value, _ in forgotten:
            self._forget(value)
        with self._lock:
            for value in chain:
                if value not in self._content:
                    self._content[value] = before
                    self._journal.stored(before, value)
                before = value

    def _forget(self, value: int) -> None:
        with self._lock:
            if self._content.pop(value, None) is not None:
                self._journal.removed(value)

    def clear(self, next_sequence: int | None = None) -> None:
        """All blocks are gone, or events are lost: then `next_sequence` is the next number."""
        self._names.cleared(next_sequence)
        with self._lock:
            self._content.clear()
            self._journal.cleared()

    def restart(self) -> None:
        """Nothing is cached, and nobody was told of anything: events count from 1 again."""
        self._names.cleared()
        with self._lock:
            self._content.clear()
            self._journal = CacheJournal()

    def drain(self) -> CacheBatch | None:
        """What changed since the last call; None: nothing."""
        return self._journal.drain()

    # -- content -----------------------------------------------------------

    def holds(self, chain: Sequence[int]) -> int:
        """Leading values of a chain, one a block, that are here."""
        for count, value in enumerate(chain):
            if value not in self._content:
                return count
        return len(chain)

    def snapshot(self) -> Iterator[Sequence[CacheChange]]:
        """Parts of the content, stores only, newest first."""
        with self._lock:
            content = [*self._content.items()]
        runs = _runs(content)
        while part := [*itertools.islice(runs, _PART_BLOCKS)]:
            yield part

    def dropped(self) -> tuple[int, int, int]:
        """Blocks dropped for an unknown parent, for another reason, and gaps."""
        _, _, unknown, ignored, gaps = self._names.stats()
        return unknown, ignored, gaps


def _salt(keys: Sequence[Any], adapter: str, *, first: bool) -> tuple[str, bool]:
    """Cache salt of a run of blocks, and whether all of their keys are understood.

    A block's keys are the adapter, then images, then, with a prompt's first block, the salt.
    """
    salt = ""
    for index, entry in enumerate(keys):
        rest = list(entry or ())
        if adapter and rest[:1] == [adapter]:
            rest = rest[1:]
        if first and index == 0 and rest and isinstance(rest[0], str):
            salt = rest.pop(0)
        if rest:
            return "", False
    return salt, True


def _runs(content: Sequence[tuple[int, int]]) -> Iterator[CacheChange]:
    """Newest first; neighbours that are parent and child become one run."""
    run: list[int] = []
    before = 0
    for value, parent in content[::-1]:
        if run and before == value and len(run) < _PART_BLOCKS:
            run.insert(0, value)
        else:
            if run:
                yield CacheChange(STORED, before, run)
            run = [value]
        before = parent
    if run:
        yield CacheChange(STORED, before, run)
