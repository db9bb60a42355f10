"""A router whose stream broke comes back: it gets what it lacks, once, in order."""

import asyncio

import pytest
from fake_engine import FakeEngine
from test_service import GENERATION, attach, end, place, read, reserved, running

from kvmesh.engine.contract import AttemptId, TokenColumns
from kvmesh.v1 import worker_pb2 as wire

ROUTER = {"router_id": "r", "router_incarnation": 3}
FIRST = AttemptId(GENERATION, 1, 1)


def wanted(next_index: int, attempt: int = 1) -> list[wire.Reattach]:
    return [wire.Reattach(generation=GENERATION, owner=1, attempt=attempt, next_index=next_index)]


def tokens(first: int, *ids: int) -> TokenColumns:
    return TokenColumns(GENERATION, [1], [1], [first], [len(ids)], list(ids))


async def begin(rig):
    """A stream that has begun; its session."""
    call, _ = await attach(rig, **ROUTER)
    await call.write(place())
    placed = await rig.engine.placed.get()
    rig.engine.emit(placed.router, step=0, openings=[reserved()])
    rig.engine.emit(placed.router, step=1, tokens=tokens(0, 40, 41))
    while not (await read(call, "step")).HasField("tokens"):
        pass
    return call, placed.router


async def drop(rig, call) -> None:
    """The stream is gone, and the worker has seen it."""
    call.cancel()
    while (await rig.stub.GetInfo(wire.GetInfoRequest())).routers:
        pass


async def taken(call) -> tuple[list[int], list[int], list[wire.StageEnd]]:
    """Indices and ids up to the stage's end, and that."""
    indices, ids = [], []
    while True:
        step = await read(call, "step")
        for first, count in zip(step.tokens.first_indices, step.tokens.counts, strict=True):
            indices.extend(range(first, first + count))
        ids.extend(step.tokens.ids)
        if step.ends:
            return indices, ids, list(step.ends)


@pytest.mark.parametrize("got", [0, 1, 2])
async def test_it_goes_on_from_what_the_router_has(got) -> None:
    async with running() as rig:
        call, session = await begin(rig)
        await drop(rig, call)
        info = await rig.stub.GetInfo(wire.GetInfoRequest())
        assert info.residue.orphans == 1
        # The engine does not stop for it.
        rig.engine.emit(session, step=2, tokens=tokens(2, 42))
        call, hello = await attach(rig, **ROUTER, reattach=wanted(got))
        assert [(kept.attempt, kept.next_index) for kept in hello.reattached] == [(1, got)]
        rig.engine.emit(session, step=3, tokens=tokens(3, 43), ends=[end()])
        indices, ids, _ = await taken(call)
        assert indices == list(range(got, 4))
        assert ids == [40 + index for index in indices]
        assert rig.engine.cancelled.empty()
        assert rig.port.running() == 0


async def test_what_ended_meanwhile_is_told_with_its_end() -> None:
    async with running() as rig:
        call, session = await begin(rig)
        await drop(rig, call)
        rig.engine.emit(session, step=2, tokens=tokens(2, 42), ends=[end()])
        call, hello = await attach(rig, **ROUTER, reattach=wanted(1))
        assert len(hello.reattached) == 1
        indices, ids, ends = await taken(call)
        assert (indices, ids) == ([1, 2], [41, 42])
        assert ends[0].HasField("finished")


async def test_what_is_not_named_or_not_known_is_dropped() -> None:
    async with running() as rig:
        call, _ = await begin(rig)
        await drop(rig, call)
        # Another attempt than the one that runs here.
        _, hello = await attach(rig, **ROUTER, reattach=wanted(0, attempt=2))
        assert not hello.reattached
        assert await rig.engine.cancelled.get() == FIRST
        assert rig.port.running() == 0


async def test_another_start_of_the_router_owns_nothing() -> None:
    async with running() as rig:
        call, _ = await begin(rig)
        await drop(rig, call)
        _, hello = await attach(rig, router_id="r", router_incarnation=4, reattach=wanted(0))
        assert not hello.reattached
        assert await rig.engine.cancelled.get() == FIRST


async def test_a_stream_that_is_open_still_is_replaced_by_its_successor() -> None:
    async with running() as rig:
        old, session = await begin(rig)
        new, hello = await attach(rig, **ROUTER, reattach=wanted(2))
        assert len(hello.reattached) == 1
        rig.engine.emit(session, step=2, tokens=tokens(2, 42), ends=[end()])
        indices, _, _ = await taken(new)
        assert indices == [2]
        # What the old one says is no command any more.
        assert (await old.code()).name == "RESOURCE_EXHAUSTED"
        assert rig.engine.cancelled.empty()


async def test_what_was_sent_long_ago_cannot_be_said_again() -> None:
    async with running(replay_bytes=1) as rig:
        call, _ = await begin(rig)
        await drop(rig, call)
        _, hello = await attach(rig, **ROUTER, reattach=wanted(0))
        assert not hello.reattached
        assert await rig.engine.cancelled.get() == FIRST


async def test_nobody_waits_for_ever() -> None:
    async with running(orphan_ttl_s=0.05, load_interval_ms=10.0) as rig:
        assert isinstance(rig.engine, FakeEngine)
        call, _ = await begin(rig)
        call.cancel()
        async with asyncio.timeout(30):
            assert await rig.engine.cancelled.get() == FIRST
        assert rig.port.running() == 0
