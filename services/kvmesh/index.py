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
        return (0, self.parent, self.chain, self.tier)


@dataclass(frozen=True)
class Removed:
    """Blocks are gone from a tier."""

    chain: Values
    tier: Tier = Tier.DEVICE

    def _native(self) -> _Change:
        return (1, None, self.chain, self.tier)


@dataclass(frozen=True)
class Cleared:
    """All blocks of a worker are gone."""

    def _native(self) -> _Change:
        return (2, None, None, 0)


Change: TypeAlias = Stored | Removed | Cleared
_Change: TypeAlias = tuple[int, int | None, Values | None, int]


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


class KvIndex(_router.KvIndex):
    """Which worker holds which prefix.

    Workers are numbered from 0 as they come; numbers of removed workers are used again. Every
    method may be called from any thread; the GIL is released while it works, but for `stored` of a
    few blocks, where that would take longer. Look-ups never wait for changes, and see each call's
    changes whole or not at all.

    KeyError where a worker is not there; TypeError or BufferError where an array has another type
    than stated.
    """

    __slots__ = ()

    def apply(self, worker: int, changes: Iterable[Change]) -> None:
        """Makes several changes, in order; look-ups see all of them or none."""
        self.apply_parts(worker, [change._native() for change in changes])

    def snapshot(
        self, worker: int, changes: Iterable[Change], *, first: bool = True, last: bool = True
    ) -> None:
        """What a worker holds becomes what the parts from `first` to `last` store.

        The old view stays in use until the last part is here.
        """
        self.snapshot_parts(worker, [change._native() for change in changes], first, last)

    def lookup(
        self, chain: Values, out: npt.NDArray[np.uint32] | None = None
    ) -> npt.NDArray[np.uint32]:
        """For each worker the longest prefix that it holds without a hole, in tokens.

        `chain`: the prompt's values from its first unit on. The answer has shape (`slots`,) and 0
        for numbers without a worker. `out`, at least so long, is written and returned: the rest of
        it becomes 0; ValueError where it is shorter.
        """
        if out is not None:
            self.lookup_to(chain, out)
            return out
        while True:
            slots = self.slots
            out = np.empty(slots, dtype=np.uint32)
            try:
                self.lookup_to(chain, out)
            except ValueError:
                # Another thread may have added a worker in between.
                if self.slots == slots:
                    raise
                continue
            return out

    def lookup_tiers(self, chain: Values) -> Matches:
        """As `lookup`, and what of it lies below the device."""
        while True:
            slots = self.slots
            tokens, host, disk = np.empty((3, slots), dtype=np.uint32)
            try:
                self.lookup_to(chain, tokens, host, disk)
            except ValueError:
                if self.slots == slots:
                    raise
                continue
            return Matches(tokens, host, disk)

    def stats(self) -> IndexStats:
        """How full it is. Not for every request."""
        return IndexStats(*self.counts())


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
