"""Which worker holds which prefix: an exact, bounded index for gateways and notebooks.

A prompt is named by the chain values of its units of 16 tokens (`chain_values`, proto/HASHES.md);
a block of 16 k tokens has the name of its last unit. Needs NumPy and the native module.
docs/kv-index.md tells more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvmesh import _router

_Array = np.ndarray

UNIT_TOKENS = 16
"""Tokens that a chain value stands for."""

Values: TypeAlias = npt.NDArray[np.uint64] | Sequence[int]
"""Chain values: an array of uint64 goes in as it is, other sequences are converted."""


class Tier(IntEnum):
    """Where a cached block lies."""

    DEVICE = 0
    HOST = 1
    DISK = 2


@dataclass(frozen=True)
class Stored:
    """Blocks can be shared now.

    `parent` is the value before the first of them, the namespace's root for a first block; without
    it they are indexed as well, but found a little slower.
    """

    chain: Values
    parent: int | None = None
    tier: Tier = Tier.DEVICE

    def _native(self) -> _Change:
        return (0, self.parent, _values(self.chain), self.tier)


@dataclass(frozen=True)
class Removed:
    """Blocks are gone from a tier."""

    chain: Values
    tier: Tier = Tier.DEVICE

    def _native(self) -> _Change:
        return (1, None, _values(self.chain), self.tier)


@dataclass(frozen=True)
class Cleared:
    """All blocks of a worker are gone."""

    def _native(self) -> _Change:
        return (2, None, None, 0)


Change: TypeAlias = Stored | Removed | Cleared
_Change: TypeAlias = tuple[int, int | None, npt.NDArray[np.uint64] | None, int]


@dataclass(frozen=True)
class Matches:
    """What a prompt's look-up found, in tokens by worker number (arrays of uint32).

    Of `tokens`, `host` and `disk` are those whose fastest copy lies there; the rest is on the
    device.
    """

    tokens: npt.NDArray[np.uint32]
    host: npt.NDArray[np.uint32]
    disk: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class IndexStats:
    """How full an index is."""

    workers: int
    blocks: int = field(metadata={"doc": "distinct blocks"})
    entries: int = field(metadata={"doc": "(worker, block, tier) triples"})
    holder_sets: int = field(metadata={"doc": "distinct sets of holders"})
    bytes: int = field(metadata={"doc": "everything counted"})
    evicted: int = field(metadata={"doc": "blocks that went because of the bound, since the start"})


class KvIndex:
    """Which worker holds which prefix.

    Workers are numbered from 0 as they come; numbers of removed workers are used again. Every
    method may be called from any thread; the GIL is released while it works, but for `stored` of a
    few blocks, where that would take longer. Look-ups never wait for changes, and see each call's
    changes whole or not at all.

    KeyError where a worker is not there; TypeError or BufferError where an array has another type
    than stated.
    """

    def __init__(self, *, max_bytes: int = 1 << 30, max_workers: int = 4096) -> None:
        """`max_bytes` bounds what blocks take; above it the coldest go. `max_workers` at a time."""
        self._index = _router.KvIndex(max_bytes, max_workers)

    def add_worker(
        self,
        block_tokens: int = UNIT_TOKENS,
        *,
        ttl_ms: int | None = None,
        max_units: int = 1 << 20,
    ) -> int:
        """Takes a worker in and returns its number, the lowest that is free.

        `block_tokens`: its block size, a multiple of 16. With `ttl_ms` it is a worker without
        cache events: it is taken to hold what was sent there (`record_sent`) until that is older
        than this or more than `max_units` units of 16 tokens. ValueError for another block size,
        RuntimeError where `max_workers` are there.
        """
        return self._index.add_worker(block_tokens, ttl_ms, max_units)

    def remove_worker(self, worker: int) -> None:
        """Takes a worker and all its blocks out."""
        self._index.remove_worker(worker)

    def stored(
        self, worker: int, chain: Values, *, parent: int | None = None, tier: Tier = Tier.DEVICE
    ) -> None:
        """Blocks of a worker can be shared now; see `Stored`. One value a block, in any order."""
        # Without a call more: this one is made for every event.
        if not isinstance(chain, _Array):
            chain = _values(chain)
        self._index.stored(worker, parent, chain, tier)

    def stored_many(
        self,
        workers: npt.NDArray[np.uint32],
        parents: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        chain: npt.NDArray[np.uint64],
        *,
        tier: Tier = Tier.DEVICE,
    ) -> None:
        """Many `stored` in one call, also of several workers: faster, and seen whole.

        Event i is of `workers[i]`, comes after `parents[i]` and has the values from `offsets[i]` to
        `offsets[i + 1]` of `chain`. Shapes (n,), (n,), (n + 1,) and (offsets[n],); ValueError where
        they do not fit. Where a worker is not there, nothing is changed.
        """
        self._index.stored_many(workers, parents, offsets, chain, tier)

    def removed(self, worker: int, chain: Values, *, tier: Tier = Tier.DEVICE) -> None:
        """Blocks of a worker are gone. Values that it does not hold are ignored."""
        self._index.removed(worker, _values(chain), tier)

    def cleared(self, worker: int) -> None:
        """All blocks of a worker are gone."""
        self.apply(worker, [Cleared()])

    def apply(self, worker: int, changes: Iterable[Change]) -> None:
        """Makes several changes, in order; look-ups see all of them or none."""
        self._index.apply(worker, [change._native() for change in changes])

    def snapshot(
        self, worker: int, changes: Iterable[Change], *, first: bool = True, last: bool = True
    ) -> None:
        """What a worker holds becomes what the parts from `first` to `last` store.

        The old view stays in use until the last part is here.
        """
        self._index.snapshot(worker, [change._native() for change in changes], first, last)

    def record_sent(self, worker: int, chain: Values, now_ms: int) -> None:
        """Notes that a prompt (its whole chain) was sent to a worker without cache events.

        `now_ms` is a clock of the caller's, as in `expire`. Nothing for a worker with events.
        """
        self._index.record_sent(worker, _values(chain), now_ms)

    def expire(self, now_ms: int) -> None:
        """Forgets what was sent too long ago. To be called from time to time."""
        self._index.expire(now_ms)

    @property
    def slots(self) -> int:
        """Length of a look-up's answer: one more than the highest worker number so far."""
        return self._index.slots

    def lookup(
        self, chain: Values, out: npt.NDArray[np.uint32] | None = None
    ) -> npt.NDArray[np.uint32]:
        """For each worker the longest prefix that it holds without a hole, in tokens.

        `chain`: the prompt's values from its first unit on. The answer has shape (`slots`,) and 0
        for numbers without a worker. `out`, at least so long, is written and returned: the rest of
        it becomes 0; ValueError where it is shorter.
        """
        values = _values(chain)
        if out is not None:
            self._index.lookup(values, out)
            return out
        while True:
            slots = self._index.slots
            out = np.empty(slots, dtype=np.uint32)
            try:
                self._index.lookup(values, out)
            except ValueError:
                # Another thread may have added a worker in between.
                if self._index.slots == slots:
                    raise
                continue
            return out

    def lookup_tiers(self, chain: Values) -> Matches:
        """As `lookup`, and what of it lies below the device."""
        values = _values(chain)
        while True:
            slots = self._index.slots
            tokens, host, disk = np.empty((3, slots), dtype=np.uint32)
            try:
                self._index.lookup(values, tokens, host, disk)
            except ValueError:
                if self._index.slots == slots:
                    raise
                continue
            return Matches(tokens, host, disk)

    def held(self, worker: int) -> int:
        """Blocks of a worker that are here, in any tier; 0 for one that is not there. Not fast."""
        return self._index.held(worker)

    def stats(self) -> IndexStats:
        """How full it is. Not for every request."""
        return IndexStats(*self._index.stats())


def namespace_root(model_digest: str, adapter: str = "", cache_salt: str = "") -> int:
    """Chain value that first blocks of a namespace have as parent (proto/HASHES.md).

    `adapter` is the adapter's digest; empty for the base model.
    """
    return _router.chain_root(model_digest, adapter, cache_salt)


def chain_values(
    root: int, ids: npt.NDArray[np.uint32] | npt.NDArray[np.int32] | Sequence[int]
) -> npt.NDArray[np.uint64]:
    """Chain values of a prompt, shape (len(ids) // 16,): one for each whole unit of 16 token ids.

    Arrays of uint32 and int32 go in as they are, other sequences are converted.
    """
    if isinstance(ids, np.ndarray) and ids.dtype == np.int32:
        ids = ids.view(np.uint32)
    array = np.asarray(ids, dtype=np.uint32)
    out = np.empty(array.size // UNIT_TOKENS, dtype=np.uint64)
    _router.chain_values_to(root, array, out)
    return out


def _values(chain: Values) -> npt.NDArray[np.uint64]:
    if isinstance(chain, np.ndarray):
        return chain
    return np.asarray(chain, dtype=np.uint64)
