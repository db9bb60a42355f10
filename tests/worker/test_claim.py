"""Another router takes a generation over: it is found, claimed, and goes on there alone."""

import pytest
from port_rig import GENERATION, attach, end, place, read, reserved, running

from kvmesh.engine.contract import AttemptId, Stage, TokenColumns
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

FIRST = AttemptId(GENERATION, 1, 1)
STATE = {"resume_state": b"all of it", "tenant": "t"}


def tokens(first: int, *ids: int) -> TokenColumns:
    """As the engine says them: for the placement, whoever has it now."""
    return TokenColumns(GENERATION, [1], [1], [first], [len(ids)], list(ids))


def find(number: int, tenant: str = "t", generation: bytes = GENERATION) -> wire.RouterFrame:
    return wire.RouterFrame(number=number, find=wire.Find(generation=generation, tenant=tenant))


def claim(
    number: int, owner: int, tenant: str = "t", generation: bytes = GENERATION
) -> wire.RouterFrame:
    command = wire.Claim(generation=generation, owner=owner, tenant=tenant)
    return wire.RouterFrame(number=number, claim=command)


def cancel(number: int, owner: int) -> wire.RouterFrame:
    command = wire.Cancel(generation=GENERATION, owner=owner, attempt=1)
    return wire.RouterFrame(number=number, cancel=command)


async def begin(rig, **fields):
    """A stream of router "a" that has two tokens, and its session."""
    call, _ = await attach(rig, "a")
    await call.write(place(**(STATE | fields)))
    placed = await rig.engine.placed.get()
    rig.engine.emit(placed.router, step=0, openings=[reserved()])
    rig.engine.emit(placed.router, step=1, tokens=tokens(0, 40, 41))
    while not (await read(call, "step")).HasField("tokens"):
        pass
    return call, placed.router


async def found(call) -> wire.Found:
    while not (step := await read(call, "step")).found:
        pass
    assert len(step.found) == 1
    return step.found[0]


async def said(call):
    """What the next frame says of generations."""
    while True:
        step = await read(call, "step")
        if step.openings or step.ends or step.found or step.HasField("tokens"):
            return step


async def test_what_is_found_is_claimed_and_goes_on_at_its_new_router() -> None:
    async with running() as rig:
        old, session = await begin(rig)
        new, _ = await attach(rig, "b")
        await new.write(find(1))
        assert await found(new) == wire.Found(
            generation=GENERATION, known=True, owner=1, attempt=1, next_index=2,
            stage=wire.STAGE_WHOLE,
            # XXH3-64 of nothing: the client has none.
            model="m", output_digest=0x2D06800538D394C2,
        )  # fmt: skip
        await new.write(claim(2, 2))
        given = await found(new)
        assert (given.owner, given.attempt, list(given.output_ids)) == (2, 1, [40, 41])
        assert given.resume_state == b"all of it"
        (opening,) = (await said(new)).openings
        assert (opening.owner, opening.HasField("reserved")) == (2, True)
        (told,) = (await said(old)).ends
        assert (told.owner, told.returned.reason) == (1, wire.REFUSAL_REASON_TAKEN_OVER)

        rig.engine.emit(session, step=2, tokens=tokens(2, 42))
        row = (await said(new)).tokens
        assert (row.owners, row.first_indices, row.ids) == ([2], [2], [42])
        # What the old router says of it is over, and reaches no engine.
        await old.write(cancel(2, 1))
        await old.write(place(3, 2))
        (refused,) = (await said(old)).openings
        assert refused.refused.reason == wire.REFUSAL_REASON_TAKEN_OVER
        rig.engine.emit(session, step=3, tokens=tokens(3, 43), ends=[end()])
        last = await said(new)
        assert last.tokens.owners == [2]
        assert last.ends[0].owner == 2
        assert last.ends[0].HasField("finished")
        assert rig.engine.cancelled.empty()
        assert rig.engine.placed.empty()
        assert rig.port.running() == 0


async def test_the_engine_is_told_by_the_name_that_it_knows() -> None:
    async with running() as rig:
        _, session = await begin(rig)
        new, _ = await attach(rig, "b")
        third, _ = await attach(rig, "c")
        await new.write(claim(1, 2))
        await found(new)
        # Once more, by a third router.
        await third.write(claim(1, 3))
        assert (await found(third)).owner == 3
        await third.write(cancel(2, 3))
        assert await rig.engine.cancelled.get() == FIRST
        cancelled = FIRST.stage_end(Stage.WHOLE, wire.StageTimings(), cancelled=wire.Cancelled())
        rig.engine.emit(session, step=2, ends=[cancelled])
        while not (step := await said(third)).ends:
            pass
        assert step.ends[0].owner == 3
        await third.write(find(3))
        assert not (await found(third)).known


async def test_whoever_may_not_have_it_is_told_what_everybody_is_told() -> None:
    async with running() as rig:
        old, session = await begin(rig)
        new, _ = await attach(rig, "b")
        await new.write(find(1, "u"))
        await new.write(find(2, "t", bytes(16)))
        foreign, unknown = await found(new), await found(new)
        assert foreign == wire.Found(generation=GENERATION)
        assert unknown == wire.Found(generation=bytes(16))
        # A foreign claim changes nothing; there is no answer to it.
        await new.write(claim(3, 5, "u"))
        await new.write(find(4))
        assert (await found(new)).owner == 1
        rig.engine.emit(session, step=2, tokens=tokens(2, 42))
        assert (await said(old)).tokens.ids == [42]


async def test_what_was_not_resumable_is_not_found() -> None:
    async with running() as rig:
        await begin(rig, resume_state=b"")
        new, _ = await attach(rig, "b")
        await new.write(find(1))
        assert not (await found(new)).known


async def test_a_claim_that_is_not_higher_is_refused_with_the_number_in_force() -> None:
    async with running() as rig:
        await begin(rig)
        new, _ = await attach(rig, "b")
        late, _ = await attach(rig, "c")
        await new.write(claim(1, 2))
        await found(new)
        await late.write(claim(1, 2))
        refused = await found(late)
        assert (refused.refused, refused.owner, refused.known) == (True, 2, False)


async def test_an_owner_that_is_over_is_refused_for_an_id_that_was_never_here() -> None:
    async with running() as rig:
        new, _ = await attach(rig, "b")
        await new.write(claim(1, 2))
        await new.write(find(2))
        assert not (await found(new)).known
        old, _ = await attach(rig, "a")
        await old.write(place(**STATE))
        (refused,) = (await said(old)).openings
        assert refused.refused.reason == wire.REFUSAL_REASON_TAKEN_OVER
        assert rig.engine.placed.empty()


@pytest.mark.parametrize("again", [False, True], ids=["router gone", "router started anew"])
async def test_it_outlives_its_router(again) -> None:
    async with running() as rig:
        old, session = await begin(rig)
        old.cancel()
        while (await rig.stub.GetInfo(wire.GetInfoRequest())).routers:
            pass
        if again:
            # Another start of it owns nothing, and leaves it to whoever resumes it.
            await attach(rig, "a", router_incarnation=9)
        rig.engine.emit(session, step=2, tokens=tokens(2, 42))
        new, _ = await attach(rig, "b")
        await new.write(claim(1, 2))
        assert list((await found(new)).output_ids) == [40, 41, 42]
        rig.engine.emit(session, step=3, tokens=tokens(3, 43), ends=[end()])
        while not (step := await said(new)).ends:
            pass
        assert step.tokens.ids == [43]
        assert rig.engine.cancelled.empty()


async def test_what_ended_unheard_is_told_with_its_end() -> None:
    async with running() as rig:
        _, session = await begin(rig)
        rig.engine.emit(session, step=2, tokens=tokens(2, 42), ends=[end()])
        new, _ = await attach(rig, "b")
        await new.write(claim(1, 2))
        assert list((await found(new)).output_ids) == [40, 41, 42]
        step = await said(new)
        assert step.openings[0].owner == step.ends[0].owner == 2
        assert step.ends[0].HasField("finished")
        assert rig.port.running() == 0


async def test_one_that_is_not_answered_yet_is_answered_to_its_new_router() -> None:
    async with running() as rig:
        old, _ = await attach(rig, "a")
        await old.write(place(**STATE))
        placed = await rig.engine.placed.get()
        new, _ = await attach(rig, "b")
        await new.write(claim(1, 2))
        assert (await found(new)).next_index == 0
        (refused,) = (await said(old)).openings
        assert refused.refused.reason == wire.REFUSAL_REASON_TAKEN_OVER
        rig.engine.emit(placed.router, step=0, openings=[reserved()])
        (opening,) = (await said(new)).openings
        assert (opening.owner, opening.HasField("reserved")) == (2, True)


async def test_a_step_with_streams_of_two_routers_is_told_apart() -> None:
    async with running() as rig:
        old, session = await begin(rig)
        new, _ = await attach(rig, "b")
        other = bytes(16)
        await old.write(
            wire.RouterFrame(
                number=2,
                place=wire.Place(
                    generation=other, owner=1, attempt=1, stage=wire.STAGE_WHOLE,
                    continuation=wire.Continuation(model="m", prompt_ids=[1]),
                ),
            )
        )  # fmt: skip
        await rig.engine.placed.get()
        await new.write(claim(1, 2))
        await found(new)
        both = TokenColumns(
            GENERATION + other, [1, 1], [1, 1], [2, 0], [2, 1], [42, 43, 50],
            logprobs=[wire.RowLogprobs(row=1, tokens=[inference.TokenLogprobs(logprob=-1.0)])],
        )  # fmt: skip
        rig.engine.emit(session, step=2, tokens=both)
        while not (step := await said(new)).HasField("tokens"):
            pass
        assert (step.tokens.generations, step.tokens.ids) == (GENERATION, [42, 43])
        assert not step.tokens.logprobs
        while not (step := await said(old)).HasField("tokens"):
            pass
        assert (step.tokens.generations, step.tokens.ids) == (other, [50])
        assert [entry.row for entry in step.tokens.logprobs] == [0]


async def test_a_router_that_took_it_over_can_lose_its_session_too() -> None:
    async with running() as rig:
        _, session = await begin(rig)
        new, _ = await attach(rig, "b", router_incarnation=3)
        await new.write(claim(1, 2))
        await found(new)
        new.cancel()
        while len((await rig.stub.GetInfo(wire.GetInfoRequest())).routers) > 1:
            pass
        rig.engine.emit(session, step=2, tokens=tokens(2, 42))
        named = wire.Reattach(generation=GENERATION, owner=2, attempt=1, next_index=2)
        new, hello = await attach(rig, "b", router_incarnation=3, reattach=[named])
        assert [kept.owner for kept in hello.reattached] == [2]
        while not (step := await said(new)).HasField("tokens"):
            pass
        assert (step.tokens.first_indices, step.tokens.ids) == ([2], [42])
        # Not named: it is dropped, by the engine's name.
        new.cancel()
        while len((await rig.stub.GetInfo(wire.GetInfoRequest())).routers) > 1:
            pass
        await attach(rig, "b", router_incarnation=3)
        assert await rig.engine.cancelled.get() == FIRST


async def test_nothing_is_kept_for_ever() -> None:
    async with running(orphan_ttl_s=0.05, load_interval_ms=10.0) as rig:
        _, session = await begin(rig)
        rig.engine.emit(session, step=2, tokens=tokens(2, 42), ends=[end()])
        new, _ = await attach(rig, "b")
        number = 1
        await new.write(find(number))
        while (await found(new)).known:
            number += 1
            await new.write(find(number))


async def test_memory_for_it_is_bounded() -> None:
    async with running(resume_bytes=4) as rig:
        await begin(rig)
        new, _ = await attach(rig, "b")
        await new.write(find(1))
        assert not (await found(new)).known


OTHER = bytes(16)


async def begin_beside(rig):
    """As `begin`, with a stream of the same router that nobody could resume."""
    old, session = await begin(rig)
    continuation = wire.Continuation(model="m", prompt_ids=[1])
    place = wire.Place(
        generation=OTHER, owner=1, attempt=1, stage=wire.STAGE_WHOLE, continuation=continuation
    )
    await old.write(wire.RouterFrame(number=2, place=place))
    await rig.engine.placed.get()
    return old, session


async def goes_on(rig, session, *had: int) -> None:
    """Another router has it with all that was made, and gets what is made from then on."""
    new, _ = await attach(rig, "b")
    await new.write(claim(1, 2))
    assert list((await found(new)).output_ids) == list(had)
    rig.engine.emit(session, step=300, tokens=tokens(len(had), 7), ends=[end()])
    while not (step := await said(new)).ends:
        pass
    assert step.tokens.ids == [7]
    assert rig.engine.cancelled.empty()


async def leaves_more_than_is_kept(rig, old, session) -> None:
    """Its router goes, and what is made then passes what is kept for it."""
    old.cancel()
    while (await rig.stub.GetInfo(wire.GetInfoRequest())).routers:
        pass
    rig.engine.emit(session, step=2, tokens=tokens(2, *range(42, 60)))


async def test_what_waits_for_a_router_that_is_gone_costs_nobody_what_can_be_resumed() -> None:
    async with running(replay_bytes=1, load_interval_ms=10.0) as rig:
        old, session = await begin_beside(rig)
        await leaves_more_than_is_kept(rig, old, session)
        # The other is of no use any more: its router lacks what was forgotten.
        assert await rig.engine.cancelled.get() == AttemptId(OTHER, 1, 1)
        await goes_on(rig, session, 40, 41, *range(42, 60))


async def test_a_router_that_comes_back_lacks_what_was_forgotten() -> None:
    async with running(replay_bytes=1, load_interval_ms=10.0) as rig:
        old, session = await begin_beside(rig)
        await leaves_more_than_is_kept(rig, old, session)
        assert await rig.engine.cancelled.get() == AttemptId(OTHER, 1, 1)
        # It has two tokens, and nothing after these is known: it has to begin anew there.
        named = wire.Reattach(generation=GENERATION, owner=1, attempt=1, next_index=2)
        _, hello = await attach(rig, "a", reattach=[named])
        assert not hello.reattached
        assert await rig.engine.cancelled.get() == FIRST


async def test_a_router_that_reads_no_more_leaves_it_to_others() -> None:
    async with running(step_lane_bytes=200_000) as rig:
        _, session = await begin_beside(rig)
        many = 9_000
        rows = TokenColumns(
            OTHER * many, [1] * many, [1] * many, [0] * many, [1] * many, [42] * many
        )
        # Windows and socket buffers take some of it, not all.
        for step in range(2, 200):
            rig.engine.emit(session, step=step, tokens=rows)
            if not rig.engine.cancelled.empty():
                break
        assert await rig.engine.cancelled.get() == AttemptId(OTHER, 1, 1)
        await goes_on(rig, session, 40, 41)
