"""The paged KV pool: who holds which block, and which prefixes are cached.

A block is named by its slot. The prefix cache is a tree of full blocks, keyed
by (parent block in this pool, token ids of the block); the root of a tree
stands for (model, adapter, cache salt). So a look-up is exact by induction,
and no hash decides what is read (DESIGN 3.8). Chain values are kept only to
tell routers.

Every slot is in one state::

    free ──allocate──▶ reserved / running / pinned ──drop──▶ free
      ▲                                               │ (cached)
      └───────────── evict (leaf, oldest) ── evictable ◀┘──look-up, take──▶ held

Whoever holds a cached block holds its ancestors too. So a block that nobody
holds has no held descendant, and leaves can be evicted until all that is
evictable is gone.
"""

from __future__ import annotations

import enum
import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.engine.contract import KvRoom
from kvmesh.engine.core.cache_events import CacheJournal, ChainHashes, ChainRoot

UNIT_TOKENS = 16
"""Tokens of one link of the chain (hash scheme 1)."""


class Hold(enum.IntEnum):
    """For what a block is held. Where there are several, the first names its state."""

    RUNNING = 0
    """By a request that computes."""
    PINNED = 1
    """By an offer or a pull of a transfer."""
    RESERVED = 2
    """For a placement, not yet filled."""


_FREE, _EVICTABLE = 3, 4
_NO_PARENT = -1


class SlotVersions(Protocol):
    """The part of the native KvPool that this needs."""

    @property
    def blocks(self) -> int:
        """Slots in the pool."""

    def raise_versions(self, slots: Sequence[int]) -> None:
        """Makes peers discard what they copy of these slots from now on."""


@dataclass(slots=True)
class Root:
    """Where the prefixes of one (adapter, cache salt) begin."""

    id: int
    """Parent in keys of first blocks; less than _NO_PARENT, never used twice."""
    chain: int
    name: tuple[str, str]
    users: int = 0
    """Open sequences and cached first blocks."""


class BlockPool:
    """Slots with reference counts and the prefix cache over them.

    Used by the engine thread alone, but for `room` and `CacheSnapshot`, which
    only read.
    """

    def __init__(
        self,
        pool: SlotVersions,
        block_tokens: int,
        chain_hashes: ChainHashes,
        chain_root: ChainRoot,
    ) -> None:
        if block_tokens <= 0 or block_tokens % UNIT_TOKENS:
            raise ValueError(f"block size is {block_tokens} tokens; allowed are multiples of 16")
        self.block_tokens = block_tokens
        self.blocks = pool.blocks
        self.journal = CacheJournal()
        self._pool = pool
        self._chain_hashes = chain_hashes
        self._chain_root = chain_root
        slots = self.blocks
        self._free = list(range(slots - 1, -1, -1))
        self._holds = [array("i", bytes(4 * slots)) for _ in Hold]
        self._state = array("b", bytes([_FREE]) * slots)
        self._counts = [0, 0, 0, slots, 0]
        self.settled = 0
        """Differs when `room` does."""
        # Of cached blocks only; readers on other threads see whole values.
        self.chain = array("Q", bytes(8 * slots))
        self.parent = array("q", [_NO_PARENT]) * slots
        self.last_used = array("Q", bytes(8 * slots))
        self._children = array("i", bytes(4 * slots))
        self._keys: list[tuple[int, bytes] | None] = [None] * slots
        self._index: dict[tuple[int, bytes], int] = {}
        self._roots: dict[tuple[str, str], Root] = {}
        self._roots_by_id: dict[int, Root] = {}
        self._next_root = _NO_PARENT - 1
        self._leaves: list[tuple[int, int]] = []
        self._clock = 1

    # -- room --------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give now."""
        return self._counts[_FREE] + self._counts[_EVICTABLE]

    @property
    def changes(self) -> int:
        """Differs when something was given back since."""
        return self._clock

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        counts = self._counts
        return counts[Hold.RUNNING] + counts[Hold.PINNED] + counts[Hold.RESERVED]

    def room(self) -> KvRoom:
        """Blocks by state. May be called from any thread."""
        running, pinned, reserved, free, evictable = self._counts
        return KvRoom(free, evictable, running, pinned, reserved)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int, hold: Hold) -> list[int] | None:
        """Fresh blocks, all or none. Evicts what is cached and unused, oldest leaf first."""
        if count > self.available:
            return None
        if count <= 0:
            return []
        self._evict(count)
        slots = [self._free.pop() for _ in range(count)]
        self._pool.raise_versions(slots)
        counts = self._holds[hold]
        for slot in slots:
            counts[slot] = 1
            self._state[slot] = hold
        self._counts[_FREE] -= count
        self._counts[hold] += count
        self.settled += 1
        return slots

    def take(self, slots: Iterable[int], hold: Hold) -> None:
        """Holds blocks once more."""
        counts = self._holds[hold]
        for slot in slots:
            counts[slot] += 1
            self._settle(slot)

    def drop(self, slots: Sequence[int], hold: Hold) -> None:
        """Gives a hold of blocks back. Those of a prefix stay cached."""
        counts = self._holds[hold]
        clock = self._tick()
        for slot in slots:
            if counts[slot] <= 0:
                raise AssertionError(f"block {slot} is not held as {hold.name}")
            counts[slot] -= 1
            self.last_used[slot] = clock
            if not counts[slot]:
                self._settle(slot)

    def change(self, slots: Sequence[int], before: Hold, after: Hold) -> None:
        """Turns one kind of hold into another."""
        self.take(slots, after)
        self.drop(slots, before)

    def _settle(self, slot: int) -> None:
        """Puts a slot into the state that its holds and the cache give it."""
        running, pinned, reserved = self._holds
        if running[slot]:
            state: int = Hold.RUNNING
        elif pinned[slot]:
            state = Hold.PINNED
        elif reserved[slot]:
            state = Hold.RESERVED
        elif self._keys[slot] is not None:
            state = _EVICTABLE
        else:
            state = _FREE
        before = self._state[slot]
        if state == before:
            return
        self._state[slot] = state
        self._counts[before] -= 1
        self._counts[state] += 1
        self.settled += 1
        if state == _FREE:
            self._free.append(slot)
        elif state == _EVICTABLE and not self._children[slot]:
            self._push_leaf(slot)

    # -- prefix cache ------------------------------------------------------

    def open_root(self, adapter: str, cache_salt: str) -> Root:
        """The root of a namespace; `close_root` when the sequence ends."""
        name = (adapter, cache_salt)
        root = self._roots.get(name)
        if root is None:
            root = Root(self._next_root, self._chain_root(adapter, cache_salt), name)
            self._next_root -= 1
            self._roots[name] = root
            self._roots_by_id[root.id] = root
        root.users += 1
        return root

    def close_root(self, root: Root) -> None:
        """Gives `open_root` back."""
        root.users -= 1
        if not root.users:
            del self._roots[root.name]
            del self._roots_by_id[root.id]

    def root_chain(self, root_id: int) -> int | None:
        """Chain value of a root; None: it is gone."""
        root = self._roots_by_id.get(root_id)
        return root.chain if root is not None else None

    def find(self, root: Root, ids: bytes, most_blocks: int) -> list[int]:
        """Slots of the longest cached prefix of whole blocks; nothing is held.

        `ids` are token ids as u32, little-endian.
        """
        index, size = self._index, 4 * self.block_tokens
        parent, slots = root.id, []
        for begin in range(0, min(most_blocks * size, len(ids) - size + 1), size):
            slot = index.get((parent, ids[begin : begin + size]))
            if slot is None:
                break
            slots.append(slot)
            parent = slot
        return slots

    def store(self, root: Root, blocks: list[int], first: int, ids: array[int]) -> None:
        """Makes full blocks `first` and following of a sequence shareable.

        `blocks` are the sequence's slots, held as running; `ids` the token ids
        of the blocks that became full. Where the same block is cached already,
        the sequence gets that one and its own is freed.
        """
        count = len(ids) // self.block_tokens
        parent = blocks[first - 1] if first else root.id
        value = self.chain[parent] if first else root.chain
        raw = ids.tobytes()
        links = self._chain_hashes(value, raw)
        step, size = self.block_tokens // UNIT_TOKENS, 4 * self.block_tokens
        for i in range(count):
            key = (parent, raw[i * size : (i + 1) * size])
            slot = blocks[first + i]
            cached = self._index.get(key)
            chain = links[(i + 1) * step - 1]
            if cached is None:
                self._insert(key, slot, chain, value)
            elif cached != slot:
                self.take((cached,), Hold.RUNNING)
                self.drop((slot,), Hold.RUNNING)
                blocks[first + i] = slot = cached
            parent, value = slot, chain

    def _insert(self, key: tuple[int, bytes], slot: int, chain: int, parent_chain: int) -> None:
        parent = key[0]
        self._index[key] = slot
        self._keys[slot] = key
        self.chain[slot] = chain
        self.parent[slot] = parent
        self.last_used[slot] = self._clock
        if parent >= 0:
            self._children[parent] += 1
        else:
            self._roots_by_id[parent].users += 1
        self.journal.stored(parent_chain, chain)

    def _evict(self, count: int) -> None:
        """Forgets cached leaves until `count` blocks are free, the longest unused first."""
        leaves, last_used = self._leaves, self.last_used
        while len(self._free) < count:
            used, slot = heapq.heappop(leaves)
            # Entries are not removed when a block is used again: skip those.
            if self._state[slot] != _EVICTABLE or self._children[slot] or last_used[slot] != used:
                continue
            leaf: int | None = slot
            while leaf is not None:
                leaf = self._forget(leaf)
                if leaf is None:
                    break
                # The blocks of a sequence were mostly used last at one time: then
                # the parent is next, and need not go through the heap.
                if len(self._free) >= count or (leaves and leaves[0] < (last_used[leaf], leaf)):
                    heapq.heappush(leaves, (last_used[leaf], leaf))
                    break

    def _forget(self, slot: int) -> int | None:
        """Frees a cached leaf. Returns its parent where that can be forgotten now."""
        key = self._keys[slot]
        if key is None:
            raise AssertionError(f"block {slot} is evictable and not cached")
        del self._index[key]
        self._keys[slot] = None
        self.journal.removed(self.chain[slot])
        self.parent[slot] = _NO_PARENT
        self._state[slot] = _FREE
        self._counts[_EVICTABLE] -= 1
        self._counts[_FREE] += 1
        self.settled += 1
        self._free.append(slot)
        parent = key[0]
        if parent < 0:
            self.close_root(self._roots_by_id[parent])
            return None
        self._children[parent] -= 1
        if self._children[parent] or self._state[parent] != _EVICTABLE:
            return None
        return parent

    def _push_leaf(self, slot: int) -> None:
        heapq.heappush(self._leaves, (self.last_used[slot], slot))
        if len(self._leaves) > 4 * self.blocks + 64:
            self._leaves = [
                (self.last_used[s], s)
                for s in range(self.blocks)
                if self._state[s] == _EVICTABLE and not self._children[s]
            ]
            heapq.heapify(self._leaves)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
