"""Drives an engine as the worker service does, and collects what it says."""

import asyncio
import copy
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvmesh.engine.contract import REMOVED, STORED, AttemptId, Placement, Stage, integers
from kvmesh.engine.core.engine import TransferSettings
from kvmesh.engine.sim.build import build_engine
from kvmesh.engine.sim.settings import SimSettings
from kvmesh.v1 import worker_pb2 as wire

VOCABULARY = range(3, 2000)
LIMIT_S = 60
"""A bound that only a failure reaches, on however busy a machine."""
_numbers = itertools.count(1)


@dataclass
class Attempt:
    """What an engine said of one attempt."""

    id: AttemptId
    stage: Stage
    border: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    opening: wire.Opening | None = None
    end: wire.StageEnd | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition):
        async with asyncio.timeout(LIMIT_S):
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()
        return self

    async def opened(self):
        await self.until(lambda a: a.opening is not None)
        return self.opening

    async def ended(self):
        """The end's name; for a refused placement "refused"."""
        await self.until(lambda a: a.end is not None or a.refused)
        return "refused" if self.end is None else self.end.WhichOneof("end")

    @property
    def refused(self):
        return self.opening is not None and self.opening.HasField("refused")


class Driver:
    """One engine and its sink: hands what it says to the event loop."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.attempts: dict[AttemptId, Attempt] = {}
        self.samples = []
        self.batches = []
        self.changed = asyncio.Event()
        self.over = asyncio.Event()
        self.failure: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._halts: Callable[[], bool] | None = None
        self._go_on: threading.Event | None = None
        self._stands = asyncio.Event()

    # Called by the engine's thread; what it is given may change afterwards.
    def begin_step(self, predicted_ms) -> None: ...

    def step(self, output) -> None:
        self._loop.call_soon_threadsafe(self._take, copy.deepcopy(output))
        if self._halts is not None:
            looked = threading.Event()
            self._loop.call_soon_threadsafe(self._look, looked)
            looked.wait()

    def _look(self, looked: threading.Event) -> None:
        try:
            halts = self._halts is not None and self._halts()
        except BaseException:
            looked.set()
            raise
        if halts:
            self._go_on = looked
            self._stands.set()
        else:
            looked.set()

    def halt_when(self, holds: Callable[[], bool]) -> None:
        """From when this holds of what was said the engine stands still, until `go_on`.

        It is looked at after whatever the engine says, before it does anything else.
        """
        self._halts = holds
        self._stands.clear()
        self._release()

    async def halted(self) -> None:
        """Until it stands still. It takes commands, and does nothing for them."""
        async with asyncio.timeout(LIMIT_S):
            await self._stands.wait()

    def go_on(self) -> None:
        """Lets the engine run."""
        self._halts = None
        self._release()

    def _release(self) -> None:
        if self._go_on is not None:
            self._go_on.set()
            self._go_on = None

    def ended(self) -> None:
        self._loop.call_soon_threadsafe(self.over.set)

    def _take(self, output) -> None:
        try:
            if output.sample is not None:
                self.samples.append(output.sample)
            if output.cache is not None:
                self.batches.append(output.cache)
            for router, step in output.routers.items():
                assert router == "router"
                self.take(step)
        except BaseException as failure:
            # Raised where the test ends: here nobody would see it.
            self.failure = self.failure or failure
        self.changed.set()

    def take(self, step) -> None:
        for opening in step.openings:
            attempt = self._of(opening)
            assert attempt.opening is None
            attempt.opening = opening
            attempt.changed.set()
        rows = step.tokens
        if rows is not None:
            at = 0
            logprobs = {entry.row: entry.tokens for entry in rows.logprobs}
            owners, attempts = integers(rows.owners), integers(rows.attempts)
            firsts, ids = integers(rows.first_indices), integers(rows.ids)
            for row, count in enumerate(integers(rows.counts)):
                generation = rows.generations[16 * row : 16 * row + 16]
                attempt = self.attempts[AttemptId(generation, owners[row], attempts[row])]
                assert attempt.end is None, "tokens after the end"
                assert firsts[row] + rows.index_offset == attempt.border + len(attempt.tokens)
                attempt.tokens += ids[at : at + count]
                at += count
                attempt.logprobs += logprobs.get(row, ())
                attempt.changed.set()
            assert at == len(ids)
        for end in step.ends:
            attempt = self._of(end)
            assert attempt.opening is not None
            assert attempt.end is None, "two ends"
            attempt.end = end
            attempt.changed.set()

    def _of(self, message):
        return self.attempts[AttemptId(message.generation, message.owner, message.attempt)]

    def place(self, prompt, stage=Stage.WHOLE, *, id=None, output=(), hand_off=None, prefix_from=None,
              alone=False, trace=False, deadline_ms=0.0, request_id="", traceparent="",
              received_at=None, **continuation) -> Attempt:  # fmt: skip
        continuation.setdefault("max_tokens", 16)
        continuation = wire.Continuation(
            model="m", prompt_ids=prompt, output_ids=output,
            virtual_deadline_ms=deadline_ms, **continuation,
        )  # fmt: skip
        id = id or AttemptId(next(_numbers).to_bytes(16, "big"), 1, 1)
        attempt = self.attempts[id] = Attempt(id, stage, len(output))
        self.engine.submit(
            Placement(
                id=id, router="router", stage=stage, continuation=continuation,
                received_at=time.monotonic() if received_at is None else received_at,
                hand_off=hand_off, prefix_from=prefix_from,
                alone=alone, trace=trace, request_id=request_id, traceparent=traceparent,
            )
        )  # fmt: skip
        return attempt

    async def room_for(self, tokens) -> None:
        """Until load shows room, as a router waits for it."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                room = self.engine.load().kv
                if (room.free + room.evictable) * 16 >= tokens:
                    return
                await asyncio.sleep(0.005)

    async def idle(self) -> None:
        """Until the engine holds nothing, which it has to reach."""
        async with asyncio.timeout(LIMIT_S):
            while (residue := self.engine.residue()) != wire.Residue():
                assert residue.held_blocks >= 0
                # Transfers end by events of other threads that nothing tells of here.
                await asyncio.sleep(0.005)
        assert sum_of(self.engine.load().kv) == self.engine.capabilities().pool_blocks


class StepClock:
    """Time that passes in steps of the engine alone: the simulated one's.

    `passes`: what is called at the end of the next layers, the last one first.
    """

    def __init__(self) -> None:
        self.time = 1.0
        self.passes = []

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.time = moment
        if self.passes:
            self.passes.pop()()


async def until(holds) -> None:
    """Until something holds of which nothing tells."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.001)


def sum_of(room) -> int:
    return room.free + room.evictable + room.running + room.pinned + room.reserved


@asynccontextmanager
async def running(engine) -> AsyncIterator[Driver]:
    driver = Driver(engine)
    await asyncio.to_thread(engine.start, driver)
    try:
        yield driver
    finally:
        driver.go_on()
        await engine.close()
        async with asyncio.timeout(LIMIT_S):
            await driver.over.wait()
        if driver.failure is not None:
            raise driver.failure


def sim(
    like="kvmesh",
    blocks=512,
    transfer=False,
    worker_id="w",
    incarnation=1,
    clock=None,
    node=None,
    adapters=None,
    **settings,
):
    settings.setdefault("speed", float("inf"))
    return build_engine(
        SimSettings(like=like, **settings),
        pool_blocks=blocks,
        worker_id=worker_id,
        incarnation=incarnation,
        transfer=transfer_settings(**(node or {})) if transfer else None,
        clock=clock,
        adapters=adapters,
    )


def transfer_settings(**node) -> TransferSettings:
    """Whoever asks waits for the other side for as long as a busy machine takes."""
    return TransferSettings(**{"offer_timeout_s": LIMIT_S, "lease_s": LIMIT_S, **node})


def mesh_from(engine, worker_id="w", incarnation=1, transfer_id=None) -> wire.HandOff:
    transfer_id = transfer_id or next(_numbers).to_bytes(16, "big")
    return wire.HandOff(
        mesh=wire.MeshHandOff(
            transfer_id=transfer_id,
            sender_worker=worker_id,
            sender_incarnation=incarnation,
            sender_address=engine.transfer_address,
        )
    )


def prompt(length, seed=0) -> list[int]:
    return [(seed * 7919 + i * (i + 3) * 31) % 1900 + 50 for i in range(length)]


def apply(chains: set[int], batch) -> None:
    """What a router's index does with cache events."""
    for change in batch.changes:
        if change.kind == STORED:
            chains.update(map(int, change.chain))
        else:
            assert change.kind == REMOVED
            chains.difference_update(map(int, change.chain))


def chains_of(parts) -> list[int]:
    """Chain values that a snapshot tells."""
    return [int(value) for part in parts for change in part for value in change.chain]
