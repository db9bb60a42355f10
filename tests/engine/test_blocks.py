"""The pool against a naive model: exact prefixes, no leak, states that add up."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvmesh.engine.contract import REMOVED, STORED
from kvmesh.engine.core.blocks import BlockPool, Hold
from kvmesh.engine.core.snapshot import _hottest_first, _runs

BT = 16


class Slots:
    """Remembers which slots were raised, as the native pool does."""

    def __init__(self, blocks) -> None:
        self.blocks = blocks
        self.raised: list[int] = []

    def raise_versions(self, slots) -> None:
        self.raised += slots


def chain(parent, raw):
    values, ids = [], array("I", raw)
    for i in range(0, len(ids) // BT * BT, BT):
        parent = hash((parent, *ids[i : i + BT])) & (1 << 64) - 1
        values.append(parent)
    return values


def pool_of(blocks) -> BlockPool:
    return BlockPool(Slots(blocks), BT, chain, lambda adapter, salt: hash((adapter, salt)) & 0xFFFF)


def ids_of(words) -> array:
    return array("I", [word for word in words for _ in range(BT)])


class PoolMachine(RuleBasedStateMachine):
    """Sequences come with prompts of few words, so that prefixes are shared."""

    BLOCKS = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(self.BLOCKS)
        self.sequences = []
        # What an index believes, from events alone: chain value -> present.
        self.index: set[int] = set()
        self.written: dict[int, tuple] = {}

    @rule(
        words=st.lists(st.integers(0, 2), min_size=1, max_size=6), salt=st.sampled_from(["", "s"])
    )
    def start(self, words, salt) -> None:
        pool = self.pool
        root = pool.open_root("", salt)
        held = pool.find(root, ids_of(words).tobytes(), len(words))
        for i, slot in enumerate(held):
            assert self.written[slot] == (salt, *words[: i + 1]), "a wrong block was found"
        pool.take(held, Hold.RUNNING)
        room = pool.available
        fresh = pool.allocate(len(words) - len(held), Hold.RUNNING)
        assert (fresh is not None) == (room >= len(words) - len(held))
        if fresh is None:
            pool.drop(held, Hold.RUNNING)
            pool.close_root(root)
            return
        blocks = held + fresh
        for i in range(len(held), len(words)):
            self.written[blocks[i]] = (salt, *words[: i + 1])
        self.sequences.append((root, words, salt, blocks, len(held)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def store(self, data) -> None:
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        root, words, salt, blocks, stored = self.sequences[i]
        upto = data.draw(st.integers(stored, len(words)))
        self.pool.store(root, blocks, stored, ids_of(words[stored:upto]))
        for j in range(upto):
            assert self.written[blocks[j]] == (salt, *words[: j + 1])
        self.sequences[i] = (root, words, salt, blocks, upto)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data) -> None:
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        root, _, _, blocks, _ = self.sequences.pop(i)
        self.pool.drop(blocks, Hold.RUNNING)
        self.pool.close_root(root)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def pin_and_unpin(self, data) -> None:
        _, _, _, blocks, _ = data.draw(st.sampled_from(self.sequences))
        running = self.pool.room().running
        self.pool.take(blocks, Hold.PINNED)
        assert self.pool.room().running == running
        self.pool.drop(blocks, Hold.PINNED)

    @invariant()
    def states_add_up(self) -> None:
        room = self.pool.room()
        held = {slot for _, _, _, blocks, _ in self.sequences for slot in blocks}
        assert room.running == len(held) == self.pool.held
        assert room.free + room.evictable + room.running == self.BLOCKS

    @invariant()
    def events_tell_what_is_cached(self) -> None:
        batch = self.pool.journal.drain()
        for change in batch.changes if batch else ():
            if change.kind == STORED:
                assert not self.index & set(change.chain)
                self.index |= set(change.chain)
            else:
                assert change.kind == REMOVED
                assert set(change.chain) <= self.index
                self.index -= set(change.chain)
        pool = self.pool
        cached = {pool.chain[s] for s in range(self.BLOCKS) if pool.parent[s] != -1}
        assert cached == self.index

    @invariant()
    def snapshot_holds_what_is_cached(self) -> None:
        import numpy as np

        pool = self.pool
        used, parent = np.frombuffer(pool.last_used[:], np.uint64), np.array(pool.parent)
        order = _hottest_first(used, parent)
        assert all(a >= b for a, b in zip(used[order], used[order][1:], strict=False))
        changes = (
            _runs(order, np.frombuffer(pool.chain[:], np.uint64), parent, pool)
            if len(order)
            else []
        )
        told = [value for change in changes for value in change.chain]
        assert len(told) == len(set(told))
        assert set(told) == self.index

    def teardown(self) -> None:
        while self.sequences:
            root, _, _, blocks, _ = self.sequences.pop()
            self.pool.drop(blocks, Hold.RUNNING)
            self.pool.close_root(root)
        assert self.pool.held == 0
        # All that is cached can be evicted, and then no namespace is left.
        assert self.pool.allocate(self.BLOCKS, Hold.RESERVED) is not None
        assert self.pool._index == {}
        assert self.pool._roots == {} == self.pool._roots_by_id


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def stored_sequence(pool, words):
    root = pool.open_root("", "")
    blocks = pool.allocate(len(words), Hold.RUNNING)
    pool.store(root, blocks, 0, ids_of(words))
    pool.drop(blocks, Hold.RUNNING)
    pool.close_root(root)
    return blocks


def test_the_oldest_leaf_goes_first() -> None:
    pool = pool_of(6)
    old, new = stored_sequence(pool, [1, 2, 3]), stored_sequence(pool, [4, 5, 6])
    taken = pool.allocate(2, Hold.RUNNING)
    assert set(taken) == {old[2], old[1]}
    root = pool.open_root("", "")
    assert pool.find(root, ids_of([4, 5, 6]).tobytes(), 3) == new
    assert pool.find(root, ids_of([1, 2, 3]).tobytes(), 3) == [old[0]]


def test_versions_are_raised_before_a_slot_is_given_out() -> None:
    slots = Slots(4)
    pool = BlockPool(slots, BT, chain, lambda adapter, salt: 7)
    given = pool.allocate(3, Hold.RESERVED)
    assert sorted(slots.raised) == sorted(given)


def test_two_that_compute_the_same_block_share_one() -> None:
    pool = pool_of(4)
    root = pool.open_root("", "")
    first, second = pool.allocate(2, Hold.RUNNING), pool.allocate(2, Hold.RUNNING)
    pool.store(root, first, 0, ids_of([1, 2]))
    pool.store(root, second, 0, ids_of([1, 2]))
    assert second == first
    assert pool.room().free == 2


def test_a_hash_that_collides_finds_no_wrong_block() -> None:
    pool = BlockPool(Slots(4), BT, lambda parent, ids: [5] * (len(ids) // BT // 4), lambda a, s: 5)
    root = pool.open_root("", "")
    blocks = pool.allocate(1, Hold.RUNNING)
    pool.store(root, blocks, 0, ids_of([1]))
    assert pool.find(root, ids_of([2]).tobytes(), 1) == []


def test_giving_back_too_often_is_an_error() -> None:
    pool = pool_of(2)
    blocks = pool.allocate(1, Hold.RUNNING)
    pool.drop(blocks, Hold.RUNNING)
    with pytest.raises(AssertionError):
        pool.drop(blocks, Hold.RUNNING)
