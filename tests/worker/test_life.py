"""What a worker tells of its life: loading, warming up, draining, and how attempts ended."""

import asyncio
import contextlib
import logging
import threading

import grpc
import grpc.aio
import pytest
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from port_rig import GENERATION, attach, end, place, read, reserved, running

from kvmesh._router import WorkerPort
from kvmesh.engine.contract import AttemptId
from kvmesh.models.cancellation import Cancellation
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc as rpc
from kvmesh.worker import serve as serving
from kvmesh.worker.service import WorkerService
from kvmesh.worker.settings import SettingError, WorkerSettings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FILES = [("tokenizer.json", b"{}")], "digest"


async def health(channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest())).status


async def phase(stub) -> int:
    return (await stub.GetInfo(wire.GetInfoRequest())).load.phase


async def test_each_phase_is_answered_and_told() -> None:
    engine, port = FakeEngine(), WorkerPort("127.0.0.1:0")
    record = wire.WorkerRecord(worker_id="w", incarnation=7, role=wire.ROLE_BOTH)
    port.load(record.SerializeToString())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        stub = rpc.WorkerStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        # Nobody takes the port's events yet: health and GetInfo need nobody.
        info = await stub.GetInfo(wire.GetInfoRequest())
        assert (info.record.worker_id, info.load.phase) == ("w", wire.WORKER_PHASE_LOADING)
        for call in (attached(stub), stub.GetTokenizer(wire.GetTokenizerRequest()).read()):
            with pytest.raises(grpc.aio.AioRpcError, match="loads its model") as told:
                await call
            assert told.value.code() is grpc.StatusCode.UNAVAILABLE
        await stub.SetRole(wire.SetRoleRequest(role=wire.ROLE_DECODE))

        record.model.name = "m"
        port.warm_up(record.SerializeToString(), *FILES)
        assert await health(channel) == NOT_SERVING
        call, hello = await attach(Stubbed(stub))
        assert hello.record.model.name == "m"
        assert hello.record.role == wire.ROLE_DECODE
        await call.write(place())
        while (await read(call, "load")).phase != wire.WORKER_PHASE_WARMING_UP:
            pass

        port.serve(record.SerializeToString(), *FILES)
        assert (await watch.read()).status == SERVING
        while (await read(call, "load")).phase != wire.WORKER_PHASE_SERVING:
            pass
        service = WorkerService(engine, port, record)
        engine.start(port)
        service.start()
        # What came while it warmed up has waited.
        assert (await engine.placed.get()).id == AttemptId(GENERATION, 1, 1)
        assert await phase(stub) == wire.WORKER_PHASE_SERVING
        for again in (port.load, lambda told: port.serve(told, *FILES)):
            with pytest.raises(RuntimeError, match="serves already"):
                again(record.SerializeToString())
        await asyncio.to_thread(port.close, 0.1)
        await asyncio.to_thread(service.join)


async def test_who_attached_while_it_warmed_up_is_told_its_fit() -> None:
    engine, port = FakeEngine(), WorkerPort("127.0.0.1:0")
    record = wire.WorkerRecord(worker_id="w", incarnation=7, role=wire.ROLE_BOTH)
    port.load(record.SerializeToString())
    router = {"router_id": "r", "router_incarnation": 3}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        stub = rpc.WorkerStub(channel)
        record.model.name = "m"
        port.warm_up(record.SerializeToString(), *FILES)
        call, hello = await attach(Stubbed(stub), **router)
        assert not hello.HasField("step_model")
        await call.write(place())
        while port.running() == 0:
            await stub.GetInfo(wire.GetInfoRequest())

        record.step_model.a_ms = 3.5
        port.serve(record.SerializeToString(), *FILES)
        while await call.read() is not grpc.aio.EOF:
            pass
        assert await call.code() is grpc.StatusCode.OK
        kept = wire.Reattach(generation=GENERATION, owner=1, attempt=1)
        call, hello = await attach(Stubbed(stub), **router, reattach=[kept])
        assert hello.step_model.a_ms == 3.5
        assert len(hello.reattached) == 1
        service = WorkerService(engine, port, record)
        engine.start(port)
        service.start()
        assert (await engine.placed.get()).id == AttemptId(GENERATION, 1, 1)
        assert engine.cancelled.empty()
        await asyncio.to_thread(port.close, 0.1)
        await asyncio.to_thread(service.join)


class Stubbed:
    """What `attach` asks of a rig."""

    def __init__(self, stub) -> None:
        self.stub = stub


async def attached(stub) -> None:
    await attach(Stubbed(stub))


async def test_a_worker_answers_health_before_its_model_is_there(monkeypatch) -> None:
    loop, loaded, lines = asyncio.get_running_loop(), threading.Event(), asyncio.Queue()
    build = serving.build_engine

    def slow(*arguments):
        assert loaded.wait(60)
        return build(*arguments)

    monkeypatch.setattr(serving, "build_engine", slow)
    settings = WorkerSettings(engine="sim", model="sim", worker_id="w", labels={"zone": "a"})
    life = asyncio.create_task(
        serving.serve(settings, lambda line: loop.call_soon_threadsafe(lines.put_nowait, line))
    )

    async def said(words: str) -> str:
        while words not in (line := await lines.get()):
            pass
        return line.partition(words)[2]

    address = (await said("answering health on ")).strip()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.WorkerStub(channel)
        assert await health(channel) == NOT_SERVING
        info = await stub.GetInfo(wire.GetInfoRequest())
        assert info.load.phase == wire.WORKER_PHASE_LOADING
        assert info.record.labels == {"zone": "a"}
        loaded.set()
        await said("worker w: warming up")
        await said("worker w: warmed up in ")
        await said("serving sim on ")
        assert await health(channel) == SERVING
        info = await stub.GetInfo(wire.GetInfoRequest())
        assert info.load.phase == wire.WORKER_PHASE_SERVING
        assert info.record.step_model.a_ms > 0
        await stub.Drain(wire.DrainRequest(stop=True))
        assert await life == 0


async def test_a_worker_answers_health_while_the_fetch_of_its_model_hangs(
    monkeypatch, tmp_path
) -> None:
    """A hub that takes the connection, reads, and never answers."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue()
    asked, hang_up = asyncio.Event(), asyncio.Event()

    async def hub(reader, writer) -> None:
        assert b"owner/model" in await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await hang_up.wait()
        writer.close()

    # However long these looks take, the fetch does not end before them.
    monkeypatch.setattr("kvmesh.models.hub._CONNECT_TIMEOUT_S", 600.0)
    monkeypatch.setenv("KVMESH_CACHE", str(tmp_path))
    server = await asyncio.start_server(hub, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    settings = WorkerSettings(engine="torch", model="owner/model", worker_id="w")
    life = asyncio.create_task(
        serving.serve(settings, lambda line: loop.call_soon_threadsafe(lines.put_nowait, line))
    )
    while "answering health on " not in (line := await lines.get()):
        pass
    await asked.wait()
    address = line.partition("answering health on ")[2].strip()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.WorkerStub(channel)
        async with asyncio.timeout(60):
            for _ in range(50):
                assert await health(channel) == NOT_SERVING
                assert await phase(stub) == wire.WORKER_PHASE_LOADING
            with pytest.raises(grpc.aio.AioRpcError, match="loads its model"):
                await attached(stub)
        assert not life.done()
        # That was the fetch: its end is the worker's.
        hang_up.set()
        with pytest.raises(SettingError, match="owner/model"):
            await life
    server.close()


class Relay:
    """Passes TCP on, until nothing goes either way and nobody is told."""

    def __init__(self) -> None:
        self.vanished = False
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def before(self, port: int):
        async def accept(reader, writer) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            for source, sink in ((reader, back), (there, writer)):
                self._tasks.append(asyncio.create_task(self._pass_on(source, sink)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()

    async def _pass_on(self, source, sink) -> None:
        # An end that comes later is not passed on either: the sockets stay open.
        while data := await source.read(65_536):
            if not self.vanished:
                sink.write(data)


async def test_a_router_that_vanished_without_a_word_leaves_nothing_running() -> None:
    async with running(keep_alive_interval_s=1, keep_alive_timeout_s=5) as rig:
        relay = Relay()
        async with (
            relay.before(rig.port.port) as through,
            grpc.aio.insecure_channel(f"127.0.0.1:{through}") as channel,
        ):
            call, _ = await attach(Stubbed(rpc.WorkerStub(channel)))
            await call.write(place())
            await rig.engine.placed.get()
            # A router that answers pings stays, however little it says.
            other, _ = await attach(rig, "other")
            await other.write(place(attempt=2))
            await rig.engine.placed.get()
            relay.vanished = True
            assert await rig.engine.cancelled.get() == AttemptId(GENERATION, 1, 1)
            assert rig.port.running() == 1
            info = await rig.stub.GetInfo(wire.GetInfoRequest())
            assert list(info.routers) == ["other"]
            call.cancel()


@pytest.mark.parametrize(("own", "asked_ms", "says"), [(30.0, 1, "0.001 s"), (0.002, 0, "0.002 s")])
async def test_a_drain_without_stop_ends_with_its_grace(own, asked_ms, says, ends) -> None:
    """Its own, or the worker's; each stream and the reason are told, and logged."""
    async with running(grace_s=own) as rig:
        call, _ = await attach(rig)
        await call.write(place())
        await rig.engine.placed.get()
        await rig.stub.Drain(wire.DrainRequest(grace_ms=asked_ms))
        told = (await read(call, "step")).ends[0]
        returned = told.returned
        assert told.stage == wire.STAGE_WHOLE
        assert returned.reason == wire.REFUSAL_REASON_DRAINING
        assert f"its grace of {says} has ended" in returned.message
        assert await rig.engine.cancelled.get() == AttemptId(GENERATION, 1, 1)
        line = await ends.get()
        assert f"generation={GENERATION.hex()} owner=1 attempt=1" in line
        assert (
            f"stage=whole end=returned session=r/1 why='the worker drains, and its grace of {says}"
            in line
        )


@pytest.fixture
async def ends():
    """The lines of the log on attempts that have ended."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    class Handler(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            if "attempt ended" in line.getMessage():
                loop.call_soon_threadsafe(lines.put_nowait, line.getMessage())

    log, handler = logging.getLogger("kvmesh.worker.service"), Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.mark.parametrize("tell_all", [True, False])
async def test_the_log_has_a_line_an_attempt(tell_all, ends) -> None:
    """All of them where that is asked for, else those that went wrong; no prompt."""
    async with running(tell_all_ends=tell_all) as rig:
        call, _ = await attach(rig)
        failed = wire.StageEnd(
            generation=GENERATION, owner=1, attempt=2, stage=wire.STAGE_DECODE,
            failed=wire.StageFailed(reason="KERNEL", message="it broke"),
        )  # fmt: skip
        for attempt, told in ((1, end()), (2, failed)):
            await call.write(place(number=attempt, attempt=attempt))
            placed = await rig.engine.placed.get()
            rig.engine.emit(placed.router, openings=[reserved()], ends=[told])
        if tell_all:
            assert "attempt=1 stage=- end=finished session=r/1" in await ends.get()
        line = await ends.get()
        assert "attempt=2 stage=decode end=failed session=r/1 why='KERNEL: it broke'" in line
        # A router that goes: its attempts have no other end.
        await call.write(place(number=3, attempt=3))
        await rig.engine.placed.get()
        call.cancel()
        assert "attempt=3 stage=- end=session_ended session=r/1" in await ends.get()
        assert ends.empty()


def test_the_bounds_of_transfers_are_settings(monkeypatch) -> None:
    from kvmesh.engine.core.engine import TransferSettings
    from kvmesh.engine.sim import build as sim_build

    made = []

    def remember(**bounds):
        made.append(TransferSettings(**bounds))
        return made[-1]

    monkeypatch.setattr(sim_build, "TransferSettings", remember)
    settings = {"engine": "sim", "model": "sim", "transfer_lease": "3500ms", "offer_timeout": "7s"}
    serving.build_engine(WorkerSettings.from_mapping(settings), "w", 7, print, Cancellation())
    (bounds,) = made
    assert (bounds.lease_s, bounds.offer_timeout_s) == (3.5, 7.0)
