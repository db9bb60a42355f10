"""An engine that does what a test says, behind the real worker service."""

import asyncio
from collections.abc import AsyncIterator

from kvmesh.engine.contract import AttemptId, CacheBatch, EngineLoad, RouterStep, StepOutput
from kvmesh.v1 import worker_pb2 as wire


class FakeEngine:
    def __init__(self) -> None:
        self.placed = asyncio.Queue()
        self.cancelled: asyncio.Queue[AttemptId] = asyncio.Queue()
        self.steps: asyncio.Queue[StepOutput] = asyncio.Queue()
        self.batches: asyncio.Queue[CacheBatch] = asyncio.Queue()
        self.content: list[wire.CacheEvent] = []
        self.shares: dict[str, wire.LoadShare] = {}

    def start(self) -> None: ...

    def submit(self, placement) -> None:
        self.placed.put_nowait(placement)

    def hand_over(self, attempt, next_attempt, hand_off) -> None: ...

    def cancel(self, attempts) -> None:
        for attempt in attempts:
            self.cancelled.put_nowait(attempt)

    async def outputs(self) -> AsyncIterator[StepOutput]:
        while True:
            yield await self.steps.get()

    async def events(self) -> AsyncIterator[CacheBatch]:
        while True:
            yield await self.batches.get()

    async def snapshot(self):
        for event in self.content:
            yield 0, [event]

    def load(self) -> EngineLoad:
        return EngineLoad(wire.KvRoom(free=8), dict(self.shares), 1, 0.0, 0.0)

    def residue(self) -> wire.Residue:
        return wire.Residue()

    def capabilities(self) -> wire.Capabilities:
        return wire.Capabilities(engine="fake", block_tokens=16, hash_scheme=1)

    def step_model(self) -> wire.StepModel:
        return wire.StepModel(a_ms=1.0)

    @property
    def transfer_address(self) -> str:
        return ""

    async def close(self) -> None: ...

    def emit(self, router: str, step: int = 1, sample=None, **parts) -> None:
        self.steps.put_nowait(StepOutput(step, {router: RouterStep(**parts)}, sample))
