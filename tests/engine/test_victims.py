"""Who gives way when a pool is full, one by one (DESIGN 4, KV room).

The engine's loop is driven by hand: no thread, no step, so that each block that is
asked for shows whom it is taken from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine_harness import prompt, sim

from kvmesh.engine.contract import AttemptId, Placement, Stage
from kvmesh.engine.core.loop import EngineLoop
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.step_model import StepLoad
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

BATCH = inference.REQUEST_CLASS_BATCH
STANDARD = inference.REQUEST_CLASS_STANDARD
INTERACTIVE = inference.REQUEST_CLASS_INTERACTIVE

BLOCK = 16
PROMPT = 2 * BLOCK
EACH = 6
"""Blocks of each that starts: its prompt's and 64 tokens of room."""


@asynccontextmanager
async def full_pool(requests: int) -> AsyncIterator[EngineLoop]:
    """A loop whose pool holds so many requests and not a block more."""
    engine = sim(blocks=EACH * requests)
    try:
        yield engine._loop
    finally:
        await engine.close()


def place(
    loop: EngineLoop,
    number: int,
    request_class: inference.RequestClass = STANDARD,
    *,
    received_at: float = 0.0,
    deadline_ms: float = 0.0,
) -> Sequence:
    """Places a prompt of its own and gives it its room."""
    id = AttemptId(number.to_bytes(16, "big"), 1, 1)
    continuation = wire.Continuation(
        model="m",
        prompt_ids=prompt(PROMPT, number),
        max_tokens=10_000,
        request_class=request_class,
        virtual_deadline_ms=deadline_ms,
    )
    loop.submit(Placement(id, "router", Stage.WHOLE, continuation, received_at))
    loop.queue.chunks(wire.StepModel(saturating_chunk=1_024), StepLoad(), 0.0, None)
    sequence = loop.sequences[id]
    assert (sequence.state, len(sequence.blocks)) == (State.PREFILLING, EACH)
    return sequence


def compute(loop: EngineLoop, sequence: Sequence) -> None:
    """Its prompt's KV is here."""
    sequence.computed = PROMPT
    loop.store(sequence)


def decode(loop: EngineLoop, sequence: Sequence) -> None:
    """Its prompt is computed, and it is about to fill its last block."""
    compute(loop, sequence)
    loop.queue.remove(sequence)
    sequence.output_ids += [5] * (EACH * BLOCK - PROMPT)
    loop.streams.decode(sequence)
    assert len(sequence.blocks) == EACH


def grow(loop: EngineLoop, stream: Sequence) -> bool:
    """A stream asks for one block more."""
    stream.output_ids += [5] * BLOCK
    return loop.streams._has_room(stream)


async def test_cache_that_nobody_uses_goes_before_any_prompt() -> None:
    async with full_pool(3) as loop:
        gone, stays, stream = place(loop, 1), place(loop, 2), place(loop, 3)
        decode(loop, stream)
        compute(loop, gone)
        loop.cancel([gone.id])
        cached = gone.base.tobytes()
        assert len(loop.pool.find(gone.root, cached, 2)) == 2
        for _ in range(EACH):
            assert grow(loop, stream)
            assert stays.state is State.PREFILLING
        assert loop.pool.find(gone.root, cached, 2) == []
        assert loop.pool.available == 0


async def test_prompts_that_have_begun_go_before_any_stream_and_the_last_in_order_first() -> None:
    async with full_pool(4) as loop:
        stream = place(loop, 1, BATCH)
        decode(loop, stream)
        # Of a higher class, and not in the order in which they came.
        second = place(loop, 2, INTERACTIVE, deadline_ms=2_000)
        third = place(loop, 3, INTERACTIVE, deadline_ms=3_000)
        first = place(loop, 4, INTERACTIVE, deadline_ms=1_000)
        compute(loop, third)
        lost: list[Sequence] = []
        for asked in range(3 * EACH):
            assert grow(loop, stream)
            now = [s for s in (first, second, third) if s.state is State.QUEUED]
            lost += [sequence for sequence in now if sequence not in lost]
            # No more of them than what is asked for takes.
            assert len(lost) == asked // EACH + 1
            if asked == 0:
                # What it had computed is still there, for it or for others.
                assert len(loop.pool.find(third.root, third.base.tobytes(), 2)) == 2
        assert lost == [third, second, first]
        # They wait again, in their order.
        assert loop.queue.waiting == [first, second, third]
        assert stream.state is State.DECODING


async def test_a_prompt_in_its_step_keeps_its_room() -> None:
    async with full_pool(3) as loop:
        stream = place(loop, 1)
        decode(loop, stream)
        first = place(loop, 2, deadline_ms=1_000)
        last = place(loop, 3, deadline_ms=2_000)
        loop.queue.in_step.add(last.key)
        assert grow(loop, stream)
        assert (first.state, last.state) == (State.QUEUED, State.PREFILLING)
        loop.queue.in_step.clear()


async def test_of_streams_the_youngest_of_the_lowest_class_goes_and_one_always_stays() -> None:
    async with full_pool(4) as loop:
        batch = place(loop, 1, BATCH, received_at=1)
        older = place(loop, 2, STANDARD, received_at=2)
        younger = place(loop, 3, STANDARD, received_at=3)
        asking = place(loop, 4, INTERACTIVE, received_at=4)
        streams = [older, younger, asking, batch]
        for stream in streams:
            decode(loop, stream)
        lost: list[Sequence] = []
        for asked in range(3 * EACH):
            assert grow(loop, asking)
            now = [stream for stream in streams if stream.state is State.ENDED]
            lost += [stream for stream in now if stream not in lost]
            assert len(lost) == asked // EACH + 1
        assert lost == [batch, younger, older]
        ends = loop.answers.take()["router"].ends
        assert [end.WhichOneof("end") for end in ends] == ["returned"] * 3
        assert [end.generation for end in ends] == [stream.id.generation for stream in lost]
        # Nobody is left to give way: it waits for what transfers hold.
        assert not grow(loop, asking)
        assert asking.state is State.DECODING
        assert loop.streams.stalled == [asking]
        assert loop.answers.take() == {}
