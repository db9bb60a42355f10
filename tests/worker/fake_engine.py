"""An engine that does what a test says, behind the real worker service."""

import asyncio
import itertools

from kvmesh.engine.contract import (
    STORED,
    AttemptId,
    CacheBatch,
    CacheChange,
    EngineLoad,
    KvRoom,
    RouterStep,
    StepOutput,
)
from kvmesh.v1 import worker_pb2 as wire


class FakeEngine:
    """What the service asks comes on its thread, and goes to the test's loop."""

    def __init__(self) -> None:
        self.placed = asyncio.Queue()
        self.cancelled: asyncio.Queue[AttemptId] = asyncio.Queue()
        self.content: list[CacheChange] = []
        self.shares = {}
        self.sink = None
        self._loop = asyncio.get_running_loop()
        self._events = itertools.count(1)

    def start(self, sink) -> None:
        self.sink = sink

    def submit(self, placement) -> None:
        self._loop.call_soon_threadsafe(self.placed.put_nowait, placement)

    def hand_over(self, attempt, next_attempt, hand_off, border) -> None: ...

    def cancel(self, attempts) -> None:
        for attempt in attempts:
            self._loop.call_soon_threadsafe(self.cancelled.put_nowait, attempt)

    def snapshot(self):
        for change in self.content:
            yield [change]

    def load(self) -> EngineLoad:
        return EngineLoad(KvRoom(free=8), dict(self.shares), 1)

    def residue(self) -> wire.Residue:
        return wire.Residue(held_blocks=5)

    def capabilities(self) -> wire.Capabilities:
        return wire.Capabilities(engine="fake", block_tokens=16, hash_scheme=1)

    def step_model(self) -> wire.StepModel:
        return wire.StepModel(a_ms=1.0)

    @property
    def transfer_address(self) -> str:
        return ""

    async def close(self) -> None: ...

    # -- what the test makes it say ----------------------------------------

    def emit(self, router: str, step: int = 1, sample=None, **parts) -> None:
        self.sink.step(StepOutput(step, {router: RouterStep(**parts)}, sample, self.load()))

    def store(self, *chains) -> None:
        """One cache event a chain."""
        changes = [CacheChange(STORED, 1, chain) for chain in chains]
        first = next(self._events)
        for _ in changes[1:]:
            next(self._events)
        self.sink.step(StepOutput(load=self.load(), cache=CacheBatch(first, changes)))
