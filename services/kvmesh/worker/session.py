"""One router's session: what waits to be sent, and in which order.

Three lanes, drained in this order (PROTOCOLS 1):

* step output: never dropped, never reordered; past its bound in bytes or age
  the session is closed, for then the router does not read;
* load: only the newest; at most one per `load_coalesce_ms`, at least one per
  `load_interval_ms`; rides on a step frame where one goes anyway;
* cache: a place in the shared log, or a snapshot where the log has gone on.

Used by the event loop alone. A slow router fills its own lanes and nobody
else's: whoever pushes never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.engine.contract import AttemptId, RouterStep
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.cache_log import CacheLog, snapshot_frame, split_events
from kvmesh.worker.frames import step_frames

Snapshot = AsyncIterator[tuple[int, Sequence[wire.CacheEvent]]]


class SessionClosedError(Exception):
    """The worker ends a session. The text says why."""


@dataclass(frozen=True, slots=True)
class LaneBounds:
    """What a session may hold back."""

    step_bytes: int
    step_age_s: float
    load_coalesce_s: float


@dataclass(slots=True)
class _StepLane:
    frames: deque[tuple[float, bytes]] = field(default_factory=deque)
    bytes: int = 0


class Session:
    """The sending side of one Attach stream."""

    def __init__(
        self,
        key: str,
        router_id: str,
        bounds: LaneBounds,
        cache: CacheLog,
        next_event: int,
        read_load: Callable[[Session], wire.Load],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self.key = key
        """Unique over the life of the worker: answers of an old session find nobody."""
        self.router_id = router_id
        self.attempts: set[AttemptId] = set()
        """Attempts placed here and not ended."""
        self.last_command = 0
        self._bounds = bounds
        self._cache = cache
        self._next_event = next_event
        self._read_load = read_load
        self._snapshot = snapshot
        self._steps = _StepLane()
        self._load_dirty = True
        self._load_sent_at = 0.0
        self._load_timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # -- what is pushed ----------------------------------------------------

    def push_step(self, step: int, output: RouterStep, sample: wire.StepSample | None) -> None:
        """Queues what a step brought, and takes note of what ended."""
        for opening in output.openings:
            if opening.HasField("refused"):
                self._forget(opening)
        for end in output.ends:
            self._forget(end)
        now = time.monotonic()
        load = None
        if now - self._load_sent_at >= self._bounds.load_coalesce_s:
            load = self._take_load(now)
        else:
            self.mark_load()
        for frame in step_frames(step, output, sample, load):
            self._steps.frames.append((now, frame))
            self._steps.bytes += len(frame)
        self._check_step_bounds(now)
        self._wake.set()

    def push_found(self, found: wire.Found) -> None:
        """Queues the answer to Find or Claim."""
        step = wire.StepOutput(last=True, found=[found])
        frame = wire.WorkerFrame(step=step).SerializeToString()
        self._steps.frames.append((time.monotonic(), frame))
        self._steps.bytes += len(frame)
        self._wake.set()

    def mark_load(self) -> None:
        """The load has changed: tell it when it is due."""
        self._load_dirty = True
        if self._load_timer is None:
            due = self._load_sent_at + self._bounds.load_coalesce_s - time.monotonic()
            if due <= 0:
                self._wake.set()
            else:
                self._load_timer = asyncio.get_running_loop().call_later(due, self._load_due)

    def wake(self) -> None:
        """There may be something new in the cache log."""
        self._wake.set()

    def close(self, reason: str) -> None:
        """Ends the session; `closed` raises."""
        if not self._closed.done():
            self._closed.set_exception(SessionClosedError(reason))

    async def closed(self) -> None:
        """Waits until `close`, then raises `SessionClosedError`."""
        await asyncio.shield(self._closed)

    def release(self) -> None:
        """Drops timers. Called once, when the stream has ended."""
        if self._load_timer is not None:
            self._load_timer.cancel()
        if not self._closed.done():
            # Whoever closes it from now on comes too late, and does no harm.
            self._closed.cancel()
        elif not self._closed.cancelled():
            # Taken, so that a reason nobody waited for is not reported as lost.
            self._closed.exception()

    # -- what is sent ------------------------------------------------------

    async def send_all(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Drains the lanes for ever, the most urgent first."""
        snapshot: AsyncIterator[bytes] | None = None
        while True:
            if self._steps.frames:
                _, frame = self._steps.frames.popleft()
                self._steps.bytes -= len(frame)
                await write(frame)
                continue
            now = time.monotonic()
            if self._load_dirty and now - self._load_sent_at >= self._bounds.load_coalesce_s:
                await write(wire.WorkerFrame(load=self._take_load(now)).SerializeToString())
                continue
            if snapshot is None and not self._cache.covers(self._next_event):
                snapshot = self._snapshot_frames()
            if snapshot is not None:
                part = await anext(snapshot, None)
                if part is not None:
                    await write(part)
                    continue
                snapshot = None
                continue
            following = self._cache.frame_from(self._next_event)
            if following is not None:
                self._next_event, frame = following
                await write(frame)
                continue
            self._wake.clear()
            if not self._has_work():
                await self._wake.wait()

    def _has_work(self) -> bool:
        return bool(self._steps.frames) or self._next_event <= self._cache.last_event

    async def _snapshot_frames(self) -> AsyncIterator[bytes]:
        """The cache's content; afterwards the log goes on from its beginning."""
        as_of = self._cache.last_event
        held: list[wire.CacheEvent] | None = None
        first = True
        async for _, stores in self._snapshot():
            for part in split_events(stores):
                if held is not None:
                    yield snapshot_frame(held, first=first, last=False, as_of_event=0)
                    first = False
                held = part
        yield snapshot_frame(held or [], first=first, last=True, as_of_event=as_of)
        self._next_event = as_of + 1

    # -- load --------------------------------------------------------------

    def _take_load(self, now: float) -> wire.Load:
        self._load_dirty = False
        self._load_sent_at = now
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None
        return self._read_load(self)

    def _load_due(self) -> None:
        self._load_timer = None
        self._wake.set()

    # -- bookkeeping -------------------------------------------------------

    def _forget(self, answer: wire.Opening | wire.StageEnd) -> None:
        self.attempts.discard(AttemptId(answer.generation, answer.owner, answer.attempt))

    def _check_step_bounds(self, now: float) -> None:
        oldest = self._steps.frames[0][0]
        if self._steps.bytes > self._bounds.step_bytes:
            self.close(
                f"step output of {self._steps.bytes} bytes waits, allowed are "
                f"{self._bounds.step_bytes}"
            )
        elif now - oldest > self._bounds.step_age_s:
            self.close(
                f"step output has waited for {now - oldest:.1f} s, allowed are "
                f"{self._bounds.step_age_s:.1f} s"
            )
