"""A stream on a worker that is told of every step it is in: what the steps hold."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc as rpc

MOST_TOKENS = 100_000
"""It does not end by itself."""


class StepWatch:
    """A session beside the router's, with one stream. It decodes on return of `begin`."""

    def __init__(self, stub: rpc.WorkerStub) -> None:
        self.samples: list[wire.StepSample] = []
        """Of all steps since it decodes."""
        self._call = stub.Attach()
        self._generation = os.urandom(16)
        self._decodes = asyncio.Event()

    async def begin(self, model: str, itl_target_ms: float) -> None:
        """Places the stream. Only whoever reads (`read`) sees it decode."""
        hello = wire.RouterHello(
            version=wire.ProtocolVersion(major=1), router_id="watch", router_incarnation=1
        )
        await self._call.write(wire.RouterFrame(hello=hello))
        continuation = wire.Continuation(
            model=model,
            prompt_ids=[300],
            max_tokens=MOST_TOKENS,
            itl_target_ms=itl_target_ms,
            sampling=wire.ResolvedSampling(repetition_penalty=1, top_p=1),
        )
        place = wire.Place(
            generation=self._generation,
            owner=1,
            attempt=1,
            stage=wire.STAGE_WHOLE,
            continuation=continuation,
        )
        await self._call.write(wire.RouterFrame(number=1, place=place))
        await self._decodes.wait()

    async def end(self) -> None:
        """Cancels the stream."""
        cancel = wire.Cancel(generation=self._generation, owner=1, attempt=1)
        await self._call.write(wire.RouterFrame(number=2, cancel=cancel))

    async def read(self) -> None:
        """Takes what the worker says until the stream has ended."""
        while (frame := await self._call.read()) is not grpc.aio.EOF:
            step = frame.step
            for opening in step.openings:
                assert opening.HasField("reserved"), opening
            if step.HasField("sample"):
                if step.sample.decode_batch:
                    self._decodes.set()
                if self._decodes.is_set():
                    self.samples.append(step.sample)
            if step.ends:
                assert [end.WhichOneof("end") for end in step.ends] == ["cancelled"]
                await self._call.done_writing()
                return
        raise AssertionError("the worker closed the session")


@asynccontextmanager
async def step_watch(
    address: str, model: str, itl_target_ms: float
) -> AsyncIterator[list[wire.StepSample]]:
    """A stream of its own on this worker, and what steps held since it decodes."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as group:
        watch = StepWatch(rpc.WorkerStub(channel))
        reading = group.create_task(watch.read())
        await watch.begin(model, itl_target_ms)
        yield watch.samples
        await watch.end()
        await reading
