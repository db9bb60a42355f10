"""The Worker service over real sockets, with an engine that a test drives."""

import asyncio
from array import array

import grpc
import grpc.aio
import numpy as np
import pytest
from port_rig import GENERATION, attach, end, place, read, reserved, running

from kvmesh.engine.contract import (
    STORED,
    AttemptId,
    CacheBatch,
    CacheChange,
    StepOutput,
    StepSample,
    TokenColumns,
)
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.tokenizer_files import TokenizerFiles


async def test_a_placement_runs_and_its_tokens_come_in_order() -> None:
    async with running() as rig:
        call, hello = await attach(rig)
        assert hello.record.incarnation == 7
        assert hello.step_model.a_ms == 1.0
        await call.write(place())
        placed = await rig.engine.placed.get()
        assert list(memoryview(placed.prompt_ids).cast("I")) == [1, 2]
        rows = TokenColumns(GENERATION, [1], [1], [0], [1], [42])
        rig.engine.emit(placed.router, step=0, openings=[reserved()])
        rig.engine.emit(placed.router, step=1, tokens=rows, sample=StepSample(decode_batch=1))
        rig.engine.emit(placed.router, step=2, ends=[end()])
        first = await read(call, "step")
        assert first.openings[0].reserved.tokens_reserved == 66
        second = await read(call, "step")
        assert list(second.tokens.ids) == [42]
        assert second.sample.decode_batch == 1
        assert (await read(call, "step")).ends[0].HasField("finished")
        assert rig.port.running() == 0


async def test_load_echoes_the_last_command() -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        await call.write(place(number=5))
        placed = await rig.engine.placed.get()
        # Until the engine has answered, its load does not hold the placement.
        assert (await read(call, "load")).last_command < 5
        rig.engine.emit(placed.router, step=0, openings=[reserved()])
        assert (await read(call, "step")).openings
        await call.write(
            wire.RouterFrame(
                number=6, cancel=wire.Cancel(generation=GENERATION, owner=1, attempt=1)
            )
        )
        while (await read(call, "load")).last_command != 6:
            pass


async def test_a_router_that_goes_leaves_nothing_running() -> None:
    async with running(orphan_ttl_s=0.05, load_interval_ms=10.0) as rig:
        call, _ = await attach(rig)
        await call.write(place())
        await rig.engine.placed.get()
        call.cancel()
        assert await rig.engine.cancelled.get() == AttemptId(GENERATION, 1, 1)
        assert rig.port.running() == 0


async def test_cancel_ends_the_attempt_and_those_before_it_only() -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        for number, attempt in enumerate((1, 2, 3), start=1):
            await call.write(place(number=number, attempt=attempt))
            await rig.engine.placed.get()
        cancel = wire.Cancel(generation=GENERATION, owner=1, attempt=2)
        await call.write(wire.RouterFrame(number=4, cancel=cancel))
        got = {(await rig.engine.cancelled.get()).attempt for _ in range(2)}
        assert got == {1, 2}
        assert rig.engine.cancelled.empty()


async def test_the_same_router_attaching_anew_replaces_its_session() -> None:
    async with running() as rig:
        first, _ = await attach(rig)
        await first.write(place())
        await rig.engine.placed.get()
        second, _ = await attach(rig)
        assert await rig.engine.cancelled.get() == AttemptId(GENERATION, 1, 1)
        with pytest.raises(grpc.aio.AioRpcError, match="attached anew"):
            await read(first, "none")
        await second.write(place(attempt=2))
        assert (await rig.engine.placed.get()).id.attempt == 2


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (place(), grpc.StatusCode.INVALID_ARGUMENT),
        (
            wire.RouterFrame(
                hello=wire.RouterHello(version=wire.ProtocolVersion(major=9), router_id="r")
            ),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (
            wire.RouterFrame(
                hello=wire.RouterHello(version=wire.ProtocolVersion(major=1), router_id="a b")
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_a_wrong_first_frame_is_refused(frame, code) -> None:
    async with running() as rig:
        call = rig.stub.Attach()
        await call.write(frame)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            assert await call.read() is not grpc.aio.EOF
        assert caught.value.code() is code


async def test_a_command_without_an_attempt_closes_the_session() -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        await call.write(wire.RouterFrame(number=1, cancel=wire.Cancel(generation=b"short")))
        with pytest.raises(grpc.aio.AioRpcError, match="generation is 16 bytes"):
            await read(call, "none")


@pytest.mark.parametrize(
    ("fields", "says", "names"),
    [
        ({"stage": wire.STAGE_UNSPECIFIED}, "stage", ""),
        ({"continuation": wire.Continuation(model="m")}, "empty", "input"),
        ({"continuation": wire.Continuation(model="x", prompt_ids=[1])}, "model x", "model"),
        (
            {"continuation": wire.Continuation(model="m", prompt_ids=[1], adapter="a")},
            "adapter a",
            "adapter",
        ),
    ],
)
async def test_what_cannot_run_here_is_refused_with_a_reason(fields, says, names) -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        await call.write(place(**fields))
        opening = (await read(call, "step")).openings[0]
        assert opening.refused.reason == wire.REFUSAL_REASON_UNSUPPORTED
        assert says in opening.refused.message
        assert opening.refused.field == names
        assert rig.port.running() == 0


async def test_a_draining_worker_refuses_and_finishes_what_runs() -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        await call.write(place())
        placed = await rig.engine.placed.get()
        assert (await rig.stub.Drain(wire.DrainRequest())).running == 1
        await call.write(place(number=2, attempt=2))
        refused = (await read(call, "step")).openings[0].refused
        assert refused.reason == wire.REFUSAL_REASON_DRAINING
        rig.port.begin_stop()
        stopping = asyncio.create_task(asyncio.to_thread(rig.port.wait_idle, 60))
        rig.engine.emit(placed.router, ends=[end()])
        assert await stopping
        assert rig.engine.cancelled.empty()


async def test_what_outlives_the_grace_is_given_back() -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        await call.write(place())
        await rig.engine.placed.get()
        rig.port.begin_stop()
        assert not rig.port.wait_idle(0.0)
        rig.port.give_back(0.0)
        step = await read(call, "step")
        assert step.ends[0].returned.reason == wire.REFUSAL_REASON_DRAINING
        assert await rig.engine.cancelled.get() == AttemptId(GENERATION, 1, 1)


async def test_a_role_is_changed_and_told() -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        answer = await rig.stub.SetRole(wire.SetRoleRequest(role=wire.ROLE_DECODE))
        assert answer.role == wire.ROLE_DECODE
        while (await read(call, "load")).role != wire.ROLE_DECODE:
            pass
        assert await rig.roles.get() == wire.ROLE_DECODE
        with pytest.raises(grpc.aio.AioRpcError, match="ROLE_PREFILL, ROLE_DECODE and ROLE_BOTH"):
            await rig.stub.SetRole(wire.SetRoleRequest())


async def test_tokenizer_files_come_whole_unless_they_are_known() -> None:
    async with running() as rig:
        parts = [part async for part in rig.stub.GetTokenizer(wire.GetTokenizerRequest())]
        header = parts[0].header
        body = b"".join(part.data for part in parts[1:])
        assert len(parts) > 2
        assert TokenizerFiles.of({"tokenizer.json": body}).digest == header.digest
        known = wire.GetTokenizerRequest(known_digest=header.digest)
        assert len([part async for part in rig.stub.GetTokenizer(known)]) == 1


async def test_a_new_router_gets_a_snapshot_and_then_the_events() -> None:
    async with running(cache_ring_events=1) as rig:
        rig.engine.content = [CacheChange(STORED, 1, (1, 2)), CacheChange(STORED, 1, (3,))]
        rig.engine.store((1, 2))
        rig.engine.store((3,))
        probe, _ = await attach(rig, "probe")
        await read(probe, "cache")
        call, hello = await attach(rig)
        assert hello.last_event == 2
        first, last = await read(call, "cache"), await read(call, "cache")
        assert (first.snapshot.first, first.snapshot.last) == (True, False)
        assert (last.snapshot.first, last.snapshot.last) == (False, True)
        assert last.snapshot.as_of_event == 2
        rig.engine.store((9,))
        live = await read(call, "cache")
        assert (live.first_event, live.events[0].stored.chain[0]) == (3, 9)


async def test_a_router_that_comes_back_gets_only_what_it_missed() -> None:
    async with running() as rig:
        rig.engine.store((1,))
        first, _ = await attach(rig)
        await read(first, "cache")
        rig.engine.store((2,))
        await read(first, "cache")
        again, hello = await attach(rig, known_worker_incarnation=7, known_event=1)
        assert hello.resume_event == 2
        cache = await read(again, "cache")
        assert (cache.first_event, cache.HasField("snapshot")) == (2, False)


async def test_another_incarnation_is_told_from_the_beginning() -> None:
    async with running() as rig:
        rig.engine.content = [CacheChange(STORED, 1, (1,))]
        rig.engine.store((1,))
        first, _ = await attach(rig)
        await read(first, "cache")
        again, hello = await attach(rig, "other", known_worker_incarnation=6, known_event=1)
        assert hello.resume_event == 0
        assert (await read(again, "cache")).snapshot.first


async def test_a_router_that_does_not_read_is_closed_and_nobody_waits_for_it() -> None:
    async with running(step_lane_bytes=200_000) as rig:
        slow, _ = await attach(rig, "slow")
        other, _ = await attach(rig, "other")
        await slow.write(place())
        key = (await rig.engine.placed.get()).router
        rows = TokenColumns(
            GENERATION * 9_000, [1] * 9_000, [1] * 9_000, [0] * 9_000, [1] * 9_000, [42] * 9_000
        )
        # Windows and socket buffers take some of it, not all.
        for step in range(1, 200):
            rig.engine.emit(key, step=step, tokens=rows)
            if not rig.engine.cancelled.empty():
                break
        assert await rig.engine.cancelled.get() == AttemptId(GENERATION, 1, 1)
        await other.write(place(attempt=2))
        placed = await rig.engine.placed.get()
        rig.engine.emit(placed.router, step=0, openings=[reserved()])
        assert (await read(other, "step")).openings
        with pytest.raises(grpc.aio.AioRpcError, match="allowed are 200000"):
            await read(slow, "none")


@pytest.mark.parametrize(
    "column",
    [list, tuple, lambda ids: array("I", ids), lambda ids: np.array(ids, np.uint32), np.array],
)
async def test_columns_of_any_kind_are_told(column) -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        await call.write(place())
        key = (await rig.engine.placed.get()).router
        rows = TokenColumns(
            2 * GENERATION, column([1, 2]), column([3, 4]), column([0, 70_000]), column([1, 2]),
            column([5, 6, 4_000_000_000]),
        )  # fmt: skip
        rig.engine.emit(key, step=1, tokens=rows)
        tokens = (await read(call, "step")).tokens
        assert tokens.generations == 2 * GENERATION
        assert list(tokens.owners) == [1, 2]
        assert list(tokens.attempts) == [3, 4]
        assert list(tokens.first_indices) == [0, 70_000]
        assert list(tokens.counts) == [1, 2]
        assert list(tokens.ids) == [5, 6, 4_000_000_000]


async def test_what_does_not_fit_is_refused_to_the_engine() -> None:
    async with running() as rig:
        for rows in (
            TokenColumns(GENERATION, [1], [1], [0], [2], [5]),
            TokenColumns(GENERATION, [1, 1], [1], [0], [1], [5]),
            TokenColumns(b"short", [1], [1], [0], [1], [5]),
        ):
            with pytest.raises(ValueError, match="columns of a step"):
                rig.engine.emit("nobody", tokens=rows)
        with pytest.raises(ValueError, match="event 7 came where 1 was due"):
            rig.port.step(StepOutput(cache=CacheBatch(7, [CacheChange(STORED, 1, (1,))])))


async def test_info_tells_what_the_engine_holds_and_who_is_here() -> None:
    async with running() as rig:
        await attach(rig, "b")
        await attach(rig, "a")
        info = await rig.stub.GetInfo(wire.GetInfoRequest())
        assert info.record.worker_id == "w"
        assert list(info.routers) == ["a", "b"]
        assert info.residue.held_blocks == 5


async def test_a_port_closes_once_and_says_so_to_its_routers() -> None:
    async with running() as rig:
        call, _ = await attach(rig)
        await asyncio.to_thread(rig.port.close)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await read(call, "none")
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        rig.port.close()
        assert rig.port.wait(0.0) is None
        with pytest.raises(RuntimeError, match="was closed"):
            rig.port.serve(b"", [], "")
