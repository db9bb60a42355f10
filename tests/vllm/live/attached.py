"""Speaks to a worker as a router does, to place stages by hand."""

import itertools
import random
from contextlib import asynccontextmanager

import grpc.aio

from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc as rpc

MODEL = "smollm2-135m"
_routers = itertools.count()


class Attached:
    """One session."""

    def __init__(self, call) -> None:
        self._call = call
        self._number = itertools.count(1)

    async def place(self, ids, stage, *, hand_off=None, max_tokens=8, waited_ms=0.0) -> bytes:
        """Returns the generation's name."""
        generation = random.randbytes(16)
        continuation = wire.Continuation(
            model=MODEL,
            prompt_ids=ids,
            max_tokens=max_tokens,
            waited_ms=waited_ms,
            sampling=wire.ResolvedSampling(repetition_penalty=1, top_p=1),
        )
        place = wire.Place(
            generation=generation,
            owner=1,
            attempt=1,
            stage=stage,
            continuation=continuation,
            hand_off=hand_off,
        )
        await self._call.write(wire.RouterFrame(number=next(self._number), place=place))
        return generation

    async def cancel(self, generation: bytes) -> None:
        cancel = wire.Cancel(generation=generation, owner=1, attempt=1)
        await self._call.write(wire.RouterFrame(number=next(self._number), cancel=cancel))

    async def end(self, generation: bytes) -> tuple[list[int], wire.StageEnd]:
        """Its tokens and its end; nothing else runs in the session."""
        tokens: list[int] = []
        while True:
            frame = await self._call.read()
            assert frame is not grpc.aio.EOF
            for opening in frame.step.openings:
                assert opening.HasField("reserved"), opening
            tokens += frame.step.tokens.ids
            for end in frame.step.ends:
                assert end.generation == generation
                return tokens, end

    async def run(self, ids, stage, **more) -> tuple[list[int], wire.StageEnd]:
        return await self.end(await self.place(ids, stage, **more))


@asynccontextmanager
async def attached(address: str):
    async with grpc.aio.insecure_channel(address) as channel:
        call = rpc.WorkerStub(channel).Attach()
        hello = wire.RouterHello(
            version=wire.ProtocolVersion(major=1),
            router_id=f"by-hand-{next(_routers)}",
            router_incarnation=1,
        )
        await call.write(wire.RouterFrame(hello=hello))
        yield Attached(call)
        await call.done_writing()
