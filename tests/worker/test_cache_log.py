"""The cache lane tells each event to each router, or says that it cannot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.engine.contract import CacheBatch
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.cache_log import FRAME_BYTES, CacheLog


def stored(*chain: int) -> wire.CacheEvent:
    return wire.CacheEvent(stored=wire.BlocksStored(parent=1, chain=chain))


def read_all(log: CacheLog, next_event: int) -> list[tuple[int, int]]:
    """(number, first chain value) of every event from a place on."""
    seen = []
    while (following := log.frame_from(next_event)) is not None:
        after, frame = following
        cache = wire.WorkerFrame.FromString(frame).cache
        for i, event in enumerate(cache.events):
            number = cache.first_event + i
            if number >= next_event:
                seen.append((number, event.stored.chain[0]))
        next_event = after
    return seen


@given(
    sizes=st.lists(st.integers(1, 9), max_size=30),
    capacity=st.integers(1, 40),
    start=st.integers(0, 40),
)
def test_a_reader_gets_every_event_once_or_is_told_to_take_a_snapshot(
    sizes, capacity, start
) -> None:
    log = CacheLog(capacity)
    number = 0
    for size in sizes:
        log.append(CacheBatch(number + 1, [stored(number + 1 + i) for i in range(size)]))
        log.publish()
        number += size
    assert log.last_event == number
    covered = log.covers(start)
    if covered:
        assert read_all(log, start) == [(n, n) for n in range(start, number + 1)]
    # What lies within the bound is always there.
    assert covered or not max(1, number - capacity + 1) <= start <= number + 1


def test_memory_is_bounded_by_events() -> None:
    log = CacheLog(100)
    for n in range(1, 10_001):
        log.append(CacheBatch(n, [stored(n)]))
        log.publish()
    assert log.last_event - log.first_event < 100
    assert not log.covers(9_000)


def test_long_batches_are_cut() -> None:
    log = CacheLog(1_000)
    assert log.append(CacheBatch(1, [stored(*range(4_096)) for _ in range(8)]))
    log.publish()
    next_event, frames = 1, []
    while (following := log.frame_from(next_event)) is not None:
        next_event, frame = following
        frames.append(frame)
    assert len(frames) == 8
    assert max(map(len, frames)) <= FRAME_BYTES


def test_what_waits_is_told_together_and_in_order() -> None:
    log = CacheLog(1_000)
    for n in range(1, 41):
        assert not log.append(CacheBatch(n, [stored(n)]))
    assert log.last_event == 0
    log.publish()
    assert log.last_event == 40
    following = log.frame_from(1)
    assert following is not None
    assert following[0] == 41
    assert read_all(log, 1) == [(n, n) for n in range(1, 41)]


def test_a_gap_in_the_events_is_no_small_thing() -> None:
    log = CacheLog(10)
    log.append(CacheBatch(1, [stored(1)]))
    with pytest.raises(ValueError, match="event 3 came where 2 was due"):
        log.append(CacheBatch(3, [stored(3)]))
