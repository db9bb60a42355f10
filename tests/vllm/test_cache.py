"""vLLM's cache events turned into ours: names, salts, adapters, removals, gaps."""

import pytest

from kvmesh._router import chain_root, chain_values
from kvmesh.engine.contract import CLEARED, REMOVED, STORED
from kvmesh.engine.vllm.cache import VllmCache
from kvmesh.engine.vllm.feed import EventOrder

DIGEST = "ab" * 32
SIZE = 32


def root(adapter="", salt=""):
    return chain_root(DIGEST, {"poet": "digest-of-poet"}.get(adapter, adapter), salt)


def values(ids, parent=None, **namespace):
    """Chain values at the ends of blocks of 32 tokens."""
    start = root(**namespace) if parent is None else parent
    packed = b"".join(id.to_bytes(4, "little") for id in ids)
    return chain_values(start, packed)[1::2]


def stored(hashes, ids, parent=None, **more):
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": ids,
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(hashes),
        "group_idx": 0,
        **more,
    }


def removed(*hashes, **more):
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **more}


IDS = list(range(100, 100 + 3 * SIZE))


@pytest.fixture
def cache():
    return VllmCache(root, blocks=64)


def told(cache):
    """Kind, parent and values of what is new."""
    batch = cache.drain()
    return [] if batch is None else [(c.kind, c.parent, list(c.chain)) for c in batch.changes]


def test_a_run_of_blocks_has_our_names(cache) -> None:
    cache.apply([0.0, [stored([11, 12, 13], IDS)], 0])
    assert told(cache) == [(STORED, root(), values(IDS))]
    assert cache.holds(values(IDS)) == 3


def test_a_later_block_goes_on_from_its_parent(cache) -> None:
    cache.apply([0.0, [stored([11], IDS[:SIZE])], 0])
    cache.apply([0.0, [stored([12, 13], IDS[SIZE:], parent=11)], 0])
    whole = values(IDS)
    assert told(cache) == [(STORED, root(), whole)]


def test_events_are_numbered_without_gaps(cache) -> None:
    cache.apply([0.0, [stored([11], IDS[:SIZE])], 0])
    first = cache.drain()
    cache.apply([0.0, [removed(11), stored([12], IDS[SIZE : 2 * SIZE])], 0])
    second = cache.drain()
    assert first.first_event == 1
    assert second.first_event == 1 + len(first.changes)
    assert [change.kind for change in second.changes] == [REMOVED, STORED]


def test_salts_and_adapters_have_their_own_names(cache) -> None:
    salted = stored([21, 22, 23], IDS, extra_keys=[["s"], None, None])
    adapted = stored([31, 32, 33], IDS, lora_name="poet", extra_keys=[["poet"]] * 3)
    both = stored(
        [41, 42, 43], IDS, lora_name="poet", extra_keys=[["poet", "s"], ["poet"], ["poet"]]
    )
    cache.apply([0.0, [salted, adapted, both], 0])
    assert [chain for _, _, chain in told(cache)] == [
        values(IDS, salt="s"),
        values(IDS, adapter="poet"),
        values(IDS, adapter="poet", salt="s"),
    ]


@pytest.mark.parametrize(
    "keys", [[[["image", 0]]] * 3, [None, ["s"], None], [["s", "x"], None, None]]
)
def test_blocks_whose_keys_are_not_understood_are_left_out(cache, keys) -> None:
    cache.apply([0.0, [stored([11, 12, 13], IDS, extra_keys=keys)], 0])
    assert told(cache) == []
    assert cache.dropped() == (0, 3, 0)


def test_a_block_whose_parent_is_not_known_is_dropped_and_counted(cache) -> None:
    cache.apply([0.0, [stored([12, 13], IDS[SIZE:], parent=99)], 0])
    assert told(cache) == []
    assert cache.dropped() == (2, 0, 0)


def test_removals_take_our_names_back(cache) -> None:
    cache.apply([0.0, [stored([11, 12, 13], IDS)], 0])
    told(cache)
    cache.apply([0.0, [removed(13, 12, 999)], 0])
    assert told(cache) == [(REMOVED, 0, [values(IDS)[2], values(IDS)[1]])]
    assert cache.holds(values(IDS)) == 1


def test_another_group_and_other_media_are_not_followed(cache) -> None:
    window = stored([11, 12, 13], IDS, group_idx=1)
    offloaded = stored([11, 12, 13], IDS, medium="CPU")
    cache.apply([0.0, [window, offloaded, removed(11, medium="STORAGE")], 0])
    assert told(cache) == []


def test_the_whole_cache_can_go(cache) -> None:
    cache.apply([0.0, [stored([11, 12, 13], IDS), {"type": "AllBlocksCleared"}], 0])
    assert told(cache)[-1] == (CLEARED, 0, [])
    assert len(cache) == 0
    cache.apply([0.0, [stored([12], IDS[SIZE : 2 * SIZE], parent=11)], 0])
    assert told(cache) == []


def test_what_cannot_be_read_is_left_out_and_the_rest_taken(cache, caplog) -> None:
    bad = stored([11], IDS[:SIZE])
    del bad["token_ids"]
    cache.apply([0.0, [bad, stored([12], IDS[:SIZE])], 0])
    assert told(cache) == [(STORED, root(), values(IDS[:SIZE]))]
    assert "not understood" in caplog.text


def test_numbers_say_what_is_missing(cache) -> None:
    assert [cache.hear(number) for number in (4, 5)] == [None, None]
    assert cache.hear(5) == 5, "heard before"
    assert cache.hear(8) == 6, "6 and 7 are missing"
    cache.clear(8)
    assert cache.hear(8) is None


def test_a_snapshot_has_what_the_events_left(cache) -> None:
    for at in range(30):
        ids = [1000 * at + i for i in range(2 * SIZE)]
        cache.apply([0.0, [stored([100 + 2 * at, 101 + 2 * at], ids)], 0])
    cache.apply([0.0, [removed(103, 104)], 0])
    known = {}
    for kind, parent, chain in told(cache):
        for value in chain:
            if kind == STORED:
                known[value], parent = parent, value
            else:
                del known[value]
    seen = {}
    for part in cache.snapshot():
        for change in part:
            assert change.kind == STORED
            parent = change.parent
            for value in change.chain:
                seen[value], parent = parent, value
    assert seen == known
    assert len(cache) == len(known) == 58


def test_what_is_stored_twice_is_told_once(cache) -> None:
    cache.apply([0.0, [stored([11], IDS[:SIZE])], 0])
    cache.apply([0.0, [stored([11, 12], IDS[: 2 * SIZE])], 0])
    told_chain = [value for _, _, chain in told(cache) for value in chain]
    assert told_chain == values(IDS[: 2 * SIZE])


class Publisher:
    """What it has sent, and still has for who asks."""

    def __init__(self, cache) -> None:
        self.sent = {}
        self.kept = {}
        self.asked = []
        self.order = EventOrder(cache, lambda payload: self.sent[payload], self.ask)

    def add(self, number, *events, kept=True):
        payload = b"%d" % number
        self.sent[payload] = [0.0, list(events), 0]
        if kept:
            self.kept[number] = payload
        return number, payload

    async def ask(self, first):
        self.asked.append(first)
        return [(number, payload) for number, payload in self.kept.items() if number >= first]


def block(at, parent=None):
    return stored([50 + at], IDS[at * SIZE : (at + 1) * SIZE], parent=parent)


async def test_batches_that_were_lost_are_asked_for_and_taken_in_order(cache) -> None:
    publisher = Publisher(cache)
    first = publisher.add(7, block(0))
    publisher.add(8, block(1, parent=50))
    third = publisher.add(9, block(2, parent=51))
    await publisher.order.take(*first)
    await publisher.order.take(*third)
    assert publisher.asked == [8]
    assert cache.holds(values(IDS)) == 3
    # The late one comes after all.
    await publisher.order.take(8, b"8")
    assert cache.dropped() == (0, 0, 1)
    assert len(cache) == 3


async def test_without_a_replay_all_is_forgotten_and_built_up_anew(cache, caplog) -> None:
    publisher = Publisher(cache)
    first = publisher.add(7, block(0))
    publisher.add(8, removed(50), kept=False)
    third = publisher.add(9, block(2, parent=51), kept=False)
    await publisher.order.take(*first)
    await publisher.order.take(*third)
    assert "lost first=8 before=9" in caplog.text
    assert [kind for kind, *_ in told(cache)] == [STORED, CLEARED]
    await publisher.order.take(*publisher.add(10, block(0)))
    assert publisher.asked == [8]
    assert cache.holds(values(IDS)) == 1
