"""The prefix cache's content, for a router that starts without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.engine.core.blocks import BlockPool
from kvmesh.engine.core.cache_events import RUN_BLOCKS
from kvmesh.v1 import worker_pb2 as wire


async def snapshot_parts(pool: BlockPool) -> AsyncIterator[tuple[int, Sequence[wire.CacheEvent]]]:
    """Parts of at most 4,096 blocks, hottest first, each (last event, stores).

    Copies the pool's columns once, a few megabytes for a million blocks, and
    never holds the engine thread. A block that changes meanwhile is in the
    events that follow, which the receiver applies over this.
    """
    last_event = pool.journal.last_event
    used = np.frombuffer(pool.last_used[:], np.uint64)
    chain = np.frombuffer(pool.chain[:], np.uint64)
    parent = np.frombuffer(pool.parent[:], np.int64)
    order = await asyncio.to_thread(_hottest_first, used, parent)
    for begin in range(0, len(order), RUN_BLOCKS):
        part = order[begin : begin + RUN_BLOCKS]
        yield last_event, _runs(part, chain, parent, pool)
        # Others of the event loop go first: a snapshot is never urgent.
        await asyncio.sleep(0)


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
) -> list[wire.CacheEvent]:
    """Neighbours of which each is the child of the one before become one store."""
    borders = np.flatnonzero(parent[slots[1:]] != slots[:-1]) + 1
    events = []
    for run in np.split(slots, borders):
        above = int(parent[run[0]])
        value = int(chain[above]) if above >= 0 else pool.root_chain(above)
        # None: its namespace went while this was read.
        if value is None:
            continue
        stored = wire.BlocksStored(parent=value, chain=chain[run].tolist())
        events.append(wire.CacheEvent(stored=stored))
    return events
