"""A worker's port with an engine that a test drives, and the frames of a router."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from fake_engine import FakeEngine

from kvmesh._router import WorkerPort
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc as rpc
from kvmesh.worker.service import WorkerService
from kvmesh.worker.tokenizer_files import TokenizerFiles

GENERATION = bytes(range(16))


class Rig:
    def __init__(self, engine, port, stub) -> None:
        self.engine, self.port, self.stub = engine, port, stub
        self.roles = asyncio.Queue()


@asynccontextmanager
async def running(engine=None, **settings):
    loop = asyncio.get_running_loop()
    engine = engine or FakeEngine()
    record = wire.WorkerRecord(
        worker_id="w", incarnation=7, role=wire.ROLE_BOTH, model=wire.ModelRecord(name="m"),
        step_model=engine.step_model(), capabilities=engine.capabilities(),
    )  # fmt: skip
    files = TokenizerFiles.of({"tokenizer.json": b"{}" * 900_000})
    port = WorkerPort("127.0.0.1:0", **settings)
    service = WorkerService(engine, port, record)
    engine.start(port)
    service.start()
    port.serve(record.SerializeToString(), list(files.files.items()), files.digest)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        rig = Rig(engine, port, rpc.WorkerStub(channel))
        service.on_role = lambda: loop.call_soon_threadsafe(rig.roles.put_nowait, record.role)
        try:
            yield rig
        finally:
            await asyncio.to_thread(port.close, 0.1)
            await asyncio.to_thread(service.join)


async def attach(rig, router_id="r", **hello):
    call = rig.stub.Attach()
    version = wire.ProtocolVersion(major=1)
    await call.write(
        wire.RouterFrame(hello=wire.RouterHello(version=version, router_id=router_id, **hello))
    )
    frame = await call.read()
    assert frame.HasField("hello")
    return call, frame.hello


async def read(call, kind):
    """The next frame of a lane."""
    while True:
        frame = await call.read()
        assert frame is not grpc.aio.EOF
        if frame.WhichOneof("frame") == kind:
            return getattr(frame, kind)


def place(number=1, attempt=1, **fields) -> wire.RouterFrame:
    fields.setdefault("stage", wire.STAGE_WHOLE)
    fields.setdefault("continuation", wire.Continuation(model="m", prompt_ids=[1, 2]))
    return wire.RouterFrame(
        number=number,
        place=wire.Place(generation=GENERATION, owner=1, attempt=attempt, **fields),
    )


def reserved() -> wire.Opening:
    return wire.Opening(
        generation=GENERATION, owner=1, attempt=1, reserved=wire.Reserved(tokens_reserved=66)
    )


def end(attempt=1) -> wire.StageEnd:
    return wire.StageEnd(
        generation=GENERATION, owner=1, attempt=attempt, finished=wire.StageFinished()
    )
