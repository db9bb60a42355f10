"""The cache lane: numbered events, kept for a while, encoded once for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmesh.engine.contract import CacheBatch
from kvmesh.v1 import worker_pb2 as wire

FRAME_BYTES = 64 * 1024
"""Largest step or cache frame (PROTOCOLS 1)."""

# Eight bytes a chain value, and the tags around it.
_BLOCKS_A_FRAME = 7_000


@dataclass(frozen=True, slots=True)
class _Frame:
    first: int
    last: int
    encoded: bytes


class CacheLog:
    """A ring of encoded cache frames. Used by the event loop alone.

    A router's place in it is the number of the next event that it lacks. When
    that has left the ring, the router needs a snapshot.
    """

    def __init__(self, capacity_events: int) -> None:
        self._capacity = capacity_events
        self._frames: deque[_Frame] = deque()
        self._waiting: list[wire.CacheEvent] = []
        self._waiting_blocks = 0
        self.last_event = 0
        """Last event that routers can be told of."""

    @property
    def first_event(self) -> int:
        """Oldest event that is still here; last_event + 1 where none is."""
        return self._frames[0].first if self._frames else self.last_event + 1

    def append(self, batch: CacheBatch) -> bool:
        """Takes the next events. True: enough wait for a frame of their own.

        They are told from the next `publish` on: a step of many streams fills
        some blocks, and a frame for each step would cost more than its content.
        """
        number = self.last_event + len(self._waiting) + 1
        if batch.events and batch.first_event != number:
            raise ValueError(f"event {batch.first_event} came where {number} was due")
        self._waiting.extend(batch.events)
        self._waiting_blocks += sum(map(_size, batch.events))
        return self._waiting_blocks >= _BLOCKS_A_FRAME

    def publish(self) -> None:
        """Encodes what waits, once for all routers."""
        number = self.last_event + 1
        for part in split_events(self._waiting):
            message = wire.WorkerFrame(cache=wire.CacheEvents(first_event=number, events=part))
            last = number + len(part) - 1
            self._frames.append(_Frame(number, last, message.SerializeToString()))
            number = last + 1
        self._waiting.clear()
        self._waiting_blocks = 0
        self.last_event = number - 1
        while self._frames and self.last_event - self._frames[0].last >= self._capacity:
            self._frames.popleft()

    def covers(self, next_event: int) -> bool:
        """Whether everything from this event on is here."""
        return self.first_event <= next_event <= self.last_event + 1

    def frame_from(self, next_event: int) -> tuple[int, bytes] | None:
        """The frame that holds an event, and the number after it; None at the end.

        A frame may begin before the event: what is known already is told
        again, which changes nothing.
        """
        if next_event > self.last_event:
            return None
        low, high = 0, len(self._frames)
        while low < high:
            middle = (low + high) // 2
            if self._frames[middle].last < next_event:
                low = middle + 1
            else:
                high = middle
        frame = self._frames[low]
        return frame.last + 1, frame.encoded


def split_events(events: Sequence[wire.CacheEvent]) -> Iterator[list[wire.CacheEvent]]:
    """Runs of events whose frames stay within FRAME_BYTES.

    One event is never larger: engines cut theirs (contract.CacheBatch).
    """
    part: list[wire.CacheEvent] = []
    blocks = 0
    for event in events:
        size = _size(event)
        if part and blocks + size > _BLOCKS_A_FRAME:
            yield part
            part, blocks = [], 0
        part.append(event)
        blocks += size
    if part:
        yield part


def _size(event: wire.CacheEvent) -> int:
    """In units of a chain value, with what is around them."""
    return len(event.stored.chain) + len(event.removed.chain) + 4


def snapshot_frame(
    events: Sequence[wire.CacheEvent], *, first: bool, last: bool, as_of_event: int
) -> bytes:
    """One frame of a snapshot."""
    part = wire.SnapshotPart(first=first, last=last, as_of_event=as_of_event if last else 0)
    return wire.WorkerFrame(
        cache=wire.CacheEvents(events=events, snapshot=part)
    ).SerializeToString()
