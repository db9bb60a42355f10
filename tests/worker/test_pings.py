"""Pings are answered at any rate, also while a session says nothing for long."""

import asyncio
import struct

import grpc
import grpc.aio
import pytest
from port_rig import place, reserved, running
from raw_http2 import ACK, GOAWAY, PING, RawHttp2, prefixed

from kvmesh.v1 import worker_pb2 as wire

ATTACH = "/kvmesh.v1.Worker/Attach"
COUNT = 2_000
ENHANCE_YOUR_CALM = 0xB


class RefusedError(Exception):
    """The server answers pings by ending the connection, for this reason."""


def attached(raw: RawHttp2) -> int:
    """The call of a session in which a prompt is computed."""
    hello = wire.RouterHello(version=wire.ProtocolVersion(major=1), router_id="r")
    frames = wire.RouterFrame(hello=hello), place()
    return raw.call(
        b"".join(prefixed(frame.SerializeToString()) for frame in frames), end=False, path=ATTACH
    )


def ping(raw: RawHttp2, first: int) -> None:
    """Sends pings as fast as they can be written, and reads the answer to each."""
    wanted = [struct.pack(">Q", number) for number in range(first, first + COUNT)]
    for payload in wanted:
        raw.ping(payload)
    for payload in wanted:
        while (frame := raw.frame()).kind != PING or not frame.flags & ACK:
            if frame.kind == GOAWAY:
                raise RefusedError(int.from_bytes(frame.payload[4:8], "big"))
        assert frame.payload == payload


async def test_a_session_outlives_any_number_of_pings_in_a_silent_prefill() -> None:
    async with running() as rig:
        with RawHttp2(f"127.0.0.1:{rig.port.port}") as raw:
            # Also before anything is asked.
            await asyncio.to_thread(ping, raw, 0)
            messages = map(wire.WorkerFrame.FromString, raw.messages(attached(raw)))
            assert (await asyncio.to_thread(next, messages)).HasField("hello")
            placed = await rig.engine.placed.get()
            await asyncio.to_thread(ping, raw, COUNT)
            rig.engine.emit(placed.router, step=0, openings=[reserved()])

            def told() -> wire.StepOutput:
                return next(frame.step for frame in messages if frame.HasField("step"))

            assert list((await asyncio.to_thread(told)).openings) == [reserved()]
            assert rig.port.running() == 1


async def test_a_server_that_counts_them_would_show() -> None:
    async def silent(request_iterator, context) -> None:
        await context.write(wire.WorkerFrame())
        await asyncio.Event().wait()

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        silent, wire.RouterFrame.FromString, wire.WorkerFrame.SerializeToString
    )
    handlers = grpc.method_handlers_generic_handler("kvmesh.v1.Worker", {"Attach": handler})
    server.add_generic_rpc_handlers([handlers])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with RawHttp2(f"127.0.0.1:{port}") as raw:
            await asyncio.to_thread(next, raw.messages(attached(raw)))
            with pytest.raises(RefusedError) as refused:
                await asyncio.to_thread(ping, raw, 0)
            assert refused.value.args == (ENHANCE_YOUR_CALM,)
    finally:
        await server.stop(None)
