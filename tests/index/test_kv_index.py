"""The Python face of the index: what docs/kv-index.md says."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmesh
from kvmesh.index import (
    Cleared,
    KvIndex,
    Removed,
    Stored,
    Tier,
    chain_values,
    namespace_root,
)

VECTORS = Path(__file__).parents[2] / "proto" / "hash_vectors.json"
ROOT = namespace_root("m" * 64)


def prompt(seed: int, units: int) -> np.ndarray:
    return chain_values(
        ROOT, np.random.default_rng(seed).integers(0, 32_000, 16 * units, dtype=np.int32)
    )


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text())["cases"], ids=lambda c: c["name"])
def test_hashes_are_the_published_ones(case):
    root = namespace_root(case["model_digest"], case["adapter"], case["salt"])
    assert f"{root:016x}" == case["root"]
    chain = chain_values(root, case["ids"])
    assert chain.dtype == np.uint64
    assert [f"{value:016x}" for value in chain.tolist()] == case["chain"]
    for size, names in case["blocks"].items():
        units = int(size) // 16
        assert [f"{value:016x}" for value in chain[units - 1 :: units].tolist()] == names


def test_ids_may_be_any_integers_of_32_bits_and_in_any_layout():
    ids = np.arange(64, dtype=np.uint32)
    want = chain_values(5, ids).tolist()
    assert chain_values(5, ids.astype(np.int32)).tolist() == want
    assert chain_values(5, ids.tolist()).tolist() == want
    assert chain_values(5, np.repeat(ids, 2)[::2]).tolist() == want
    assert chain_values(5, ids[:15]).shape == (0,)


def test_the_package_has_it_and_loads_it_only_when_asked():
    assert kvmesh.KvIndex is KvIndex
    with pytest.raises(AttributeError, match="no attribute 'KvIndexes'"):
        kvmesh.KvIndexes  # noqa: B018


def test_each_worker_has_its_longest_prefix_without_a_hole():
    index = KvIndex()
    a, b, c = (index.add_worker(16) for _ in range(3))
    chain = prompt(1, 8)
    index.stored(a, chain, parent=ROOT)
    index.stored(b, chain[:3])
    index.stored(c, chain.tolist())
    index.removed(c, chain[1:2])
    assert index.lookup(chain).tolist() == [128, 48, 16]
    assert index.lookup(chain[:2]).tolist() == [32, 32, 16]
    assert index.lookup(prompt(2, 8)).tolist() == [0, 0, 0]
    assert (index.held(a), index.held(c)) == (8, 7)


def test_block_sizes_share_an_index():
    index = KvIndex()
    small, large, huge = (index.add_worker(size) for size in (16, 32, 512))
    chain = prompt(1, 70)
    index.stored(small, chain)
    index.stored(large, chain[1::2])
    index.stored(huge, chain[31::32])
    assert index.lookup(chain).tolist() == [70 * 16, 70 * 16, 64 * 16]
    assert index.lookup(chain[:33]).tolist() == [33 * 16, 32 * 16, 32 * 16]
    assert (small, large, huge) == (0, 1, 2)


def test_tiers_are_counted_apart():
    index = KvIndex()
    worker, other = index.add_worker(), index.add_worker()
    chain = prompt(1, 6)
    index.stored(worker, chain[:3])
    index.stored(worker, chain[2:5], tier=Tier.HOST)
    index.stored(worker, chain[5:], tier=Tier.DISK)
    index.stored(other, chain)
    found = index.lookup_tiers(chain)
    assert found.tokens.tolist() == [96, 96]
    assert found.host.tolist() == [32, 0]
    assert found.disk.tolist() == [16, 0]


def test_several_changes_are_made_in_order():
    index = KvIndex()
    worker = index.add_worker()
    chain = prompt(1, 4)
    index.apply(
        worker, [Stored(chain, parent=ROOT), Removed(chain[2:]), Cleared(), Stored(chain[:3])]
    )
    assert index.lookup(chain).tolist() == [48]
    index.cleared(worker)
    assert index.lookup(chain).tolist() == [0]
    assert index.stats().entries == 0


def test_many_events_go_in_at_once():
    index = KvIndex()
    for _ in range(3):
        index.add_worker()
    chain = prompt(1, 9)
    workers = np.array([2, 0, 2], dtype=np.uint32)
    parents = np.array([ROOT, ROOT, chain[4]], dtype=np.uint64)
    values = np.concatenate([chain[:5], chain[:3], chain[5:]])
    offsets = np.array([0, 5, 8, 12], dtype=np.uint64)
    index.stored_many(workers, parents, offsets, values)
    assert index.lookup(chain).tolist() == [48, 0, 144]
    with pytest.raises(ValueError, match="one offset more"):
        index.stored_many(workers, parents, offsets[:3], values)
    with pytest.raises(ValueError, match="do not fit"):
        index.stored_many(workers, parents, offsets + np.uint64(1), values)
    with pytest.raises(KeyError):
        index.stored_many(workers + np.uint32(1), parents, offsets, values)
    assert index.stats().entries == 12


def test_a_snapshot_replaces_what_was_there_when_it_is_whole():
    index = KvIndex()
    worker = index.add_worker()
    chain = prompt(1, 6)
    index.stored(worker, chain)
    index.snapshot(worker, [Stored(chain[:2])], last=False)
    assert index.lookup(chain).tolist() == [96]
    index.snapshot(worker, [Stored(chain[2:3])], first=False)
    assert index.lookup(chain).tolist() == [48]


def test_workers_without_events_hold_what_was_sent_until_it_is_old():
    index = KvIndex()
    worker = index.add_worker(32, ttl_ms=100, max_units=4)
    chain = prompt(1, 5)
    index.record_sent(worker, chain, now_ms=0)
    assert index.lookup(chain).tolist() == [64]
    index.expire(99)
    assert index.lookup(chain).tolist() == [64]
    index.expire(100)
    assert index.lookup(chain).tolist() == [0]


def test_an_array_for_the_answer_is_written_and_returned():
    index = KvIndex()
    index.add_worker()
    chain = prompt(1, 2)
    index.stored(0, chain)
    out = np.full(4, 9, dtype=np.uint32)
    assert index.lookup(chain, out) is out
    assert out.tolist() == [32, 0, 0, 0]
    with pytest.raises(ValueError, match="at least 1"):
        index.lookup(chain, np.empty(0, dtype=np.uint32))
    frozen = np.zeros(4, dtype=np.uint32)
    frozen.flags.writeable = False
    with pytest.raises(BufferError):
        index.lookup(chain, frozen)


def test_wrong_arguments_are_refused():
    index = KvIndex(max_workers=1)
    with pytest.raises(ValueError, match="block size 24"):
        index.add_worker(24)
    worker = index.add_worker()
    with pytest.raises(RuntimeError, match="no more than 1"):
        index.add_worker()
    with pytest.raises(KeyError):
        index.stored(worker + 1, prompt(1, 1))
    with pytest.raises(BufferError):
        index.stored(worker, np.zeros(3, dtype=np.float64))
    with pytest.raises(ValueError, match="one dimension"):
        index.stored(worker, np.zeros((2, 2), dtype=np.uint64))
    with pytest.raises(OverflowError):
        index.stored(worker, [-1])
    index.remove_worker(worker)
    with pytest.raises(KeyError):
        index.remove_worker(worker)
    assert index.lookup(prompt(1, 1)).tolist() == [0]


def test_memory_is_bounded_and_what_is_asked_for_stays():
    index = KvIndex(max_bytes=1 << 20)
    worker = index.add_worker()
    hot = prompt(0, 64)
    index.stored(worker, hot)
    for seed in range(1, 1500):
        index.stored(worker, prompt(seed, 64))
        assert index.lookup(hot).tolist() == [1024]
    stats = index.stats()
    assert stats.evicted > 60_000
    assert stats.bytes < (1 << 20) * 5 // 4


def test_a_batch_is_seen_whole_from_other_threads():
    index = KvIndex()
    worker = index.add_worker()
    chain = prompt(1, 300)
    done, seen = threading.Event(), set()

    def read():
        while not done.is_set():
            seen.add(int(index.lookup(chain)[worker]))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    while len(seen) < 2:
        index.apply(worker, [Stored(chain[:150]), Stored(chain[150:], parent=int(chain[149]))])
        index.apply(worker, [Removed(chain)])
    done.set()
    for reader in readers:
        reader.join()
    assert seen == {0, 4800}


blocks = st.integers(0, 11)
changes = st.lists(
    st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 2), blocks, blocks), max_size=30
)


@given(changes)
@settings(max_examples=300, deadline=None)
def test_any_history_gives_what_a_plain_model_gives(history):
    shared = prompt(3, 12).tolist()
    prompts = [shared, shared[:5] + prompt(4, 12).tolist()[5:]]
    index, model = KvIndex(), [set(), set(), set()]
    for _ in model:
        index.add_worker()
    for store, which, worker, first, last in history:
        chain = prompts[which][first : last + 1]
        if store:
            index.stored(worker, chain, parent=prompts[which][first - 1] if first else ROOT)
            model[worker].update(chain)
        else:
            index.removed(worker, chain)
            model[worker].difference_update(chain)
    for chain in prompts:
        want = [
            16 * next((at for at, value in enumerate(chain) if value not in held), len(chain))
            for held in model
        ]
        assert index.lookup(chain).tolist() == want
    assert index.stats().entries == sum(len(held) for held in model)
