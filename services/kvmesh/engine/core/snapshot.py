"""The prefix cache's content, for a router that starts without it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.engine.contract import STORED, CacheChange
from kvmesh.engine.core.blocks import BlockPool
from kvmesh.engine.core.cache_events import RUN_BLOCKS

_COPIED = 32_768
"""Slots copied at once: some 50 us in which the engine thread may have to wait."""


def snapshot_parts(pool: BlockPool) -> Iterator[Sequence[CacheChange]]:
    """Stores of at most 4,096 blocks a part, hottest first.

    Copies the pool's columns once, a few megabytes for a million blocks, and
    never holds the engine thread for longer than one slice of them takes. A
    block that changes meanwhile is in the events that follow, which the
    receiver applies over this.
    """
    used, chain = _copy(pool.last_used, np.uint64), _copy(pool.chain, np.uint64)
    parent = _copy(pool.parent, np.int64)
    order = _hottest_first(used, parent)
    for begin in range(0, len(order), RUN_BLOCKS):
        yield _runs(order[begin : begin + RUN_BLOCKS], chain, parent, pool)


def _copy(column: array[int], dtype: Any) -> npt.NDArray[Any]:
    """A column of the pool, slice by slice: the engine thread runs in between."""
    view, copy = np.frombuffer(column, dtype), np.empty(len(column), dtype)
    for begin in range(0, len(column), _COPIED):
        copy[begin : begin + _COPIED] = view[begin : begin + _COPIED]
    return copy


def _hottest_first(
    used: npt.NDArray[np.uint64], parent: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Slots of cached blocks; of those used at once, ancestors before descendants."""
    cached = np.flatnonzero(parent != -1)
    depth = _depths(parent)
    order = np.lexsort((depth[cached], np.iinfo(np.int64).max - used[cached].astype(np.int64)))
    return cached[order]


def _depths(parent: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Length of each slot's way to its root, by doubling the step."""
    step = np.where(parent >= 0, parent, np.arange(len(parent)))
    depth = (parent >= 0).astype(np.int64)
    # Copies taken at different moments may hold a ring: the rounds are bounded.
    for _ in range(max(1, len(parent).bit_length())):
        further = depth[step]
        if not further.any():
            break
        depth = depth + further
        step = step[step]
    return depth


def _runs(
    slots: npt.NDArray[np.int64],
    chain: npt.NDArray[np.uint64],
    parent: npt.NDArray[np.int64],
    pool: BlockPool,
) -> list[CacheChange]:
    """Neighbours of which each is the child of the one before become one store."""
    borders = np.flatnonzero(parent[slots[1:]] != slots[:-1]) + 1
    changes = []
    for run in np.split(slots, borders):
        above = int(parent[run[0]])
        value = int(chain[above]) if above >= 0 else pool.root_chain(above)
        # None: its namespace went while this was read.
        if value is not None:
            changes.append(CacheChange(STORED, value, chain[run]))
    return changes
