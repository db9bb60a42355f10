"""Two engines and a real transfer: tokens as if one had done it all."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from engine_harness import VOCABULARY, mesh_from, prompt, running, sim

from kvmesh._router import PrefixWanted, Pulled
from kvmesh.engine.contract import AttemptId, Stage
from kvmesh.engine.core.admission import Admission
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.v1 import worker_pb2 as wire


@asynccontextmanager
async def pair(like="kvmesh", blocks=512, **settings):
    """A prefill and a decode worker."""
    sender = sim(like, blocks=blocks, transfer=True, worker_id="p", incarnation=11, **settings)
    receiver = sim(like, blocks=blocks, transfer=True, worker_id="d", incarnation=22, **settings)
    async with running(sender) as p, running(receiver) as d:
        yield p, d


def hand_off_from(p, transfer_id=None):
    return mesh_from(p.engine, "p", 11, transfer_id)


async def request(p, d, ids, like="kvmesh", id=None, output=(), **continuation):
    """Places a request as a router does; returns (prefill, decode)."""
    prefill, hand_off = None, hand_off_from(p)
    if like == "vllm":
        prefill = p.place(ids, Stage.PREFILL, id=id, output=output, **continuation)
        if await prefill.ended() != "handed_off":
            return prefill, None
        hand_off = wire.HandOff(engine=prefill.end.handed_off.engine)
    while True:
        decode = d.place(ids, Stage.DECODE, id=id, output=output, hand_off=hand_off, **continuation)
        await decode.opened()
        if not decode.refused:
            break
        assert decode.opening.refused.reason == wire.REFUSAL_REASON_NO_ROOM
        id = AttemptId(decode.id.generation, 1, decode.id.attempt + 1)
        await d.room_for(len(ids) + len(output) + 64)
    prefill = prefill or p.place(
        ids, Stage.PREFILL, id=decode.id, output=output, hand_off=hand_off, **continuation
    )
    return prefill, decode


@pytest.mark.parametrize("like", ["kvmesh", "vllm"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 1000])
async def test_a_hand_off_gives_the_tokens_of_one_engine(like, length) -> None:
    async with pair(like) as (p, d):
        prefill, decode = await request(p, d, prompt(length), like, max_tokens=40)
        assert await prefill.ended() == "handed_off"
        assert await decode.ended() == "finished"
        expected = reference_tokens(prompt(length), 40, VOCABULARY)
        assert decode.tokens == expected
        assert prefill.tokens == ([] if like == "vllm" else expected[:1])
        assert prefill.end.handed_off.tokens_committed == len(prefill.tokens)
        assert decode.end.timings.transferred_bytes >= length * 64
        await p.idle()
        await d.idle()


@pytest.mark.parametrize("warm", ["p", "d", "both"])
async def test_a_warm_prefix_on_either_side_changes_nothing(warm) -> None:
    async with pair() as (p, d):
        for driver, name in ((p, "p"), (d, "d")):
            if warm in (name, "both"):
                await driver.place(prompt(200), max_tokens=1).ended()
        prefill, decode = await request(p, d, prompt(230), max_tokens=20)
        await decode.ended()
        assert decode.tokens == reference_tokens(prompt(230), 20, VOCABULARY)
        assert decode.opening.reserved.tokens_held == (0 if warm == "p" else 192)
        assert prefill.end.timings.computed_tokens == (230 if warm == "d" else 38)
        await p.idle()
        await d.idle()


@pytest.mark.parametrize("like", ["kvmesh", "vllm"])
async def test_small_pools_on_both_sides_finish_everything(like) -> None:
    """Pools of 1.2 prompts, 32 mixed requests."""
    longest = 400
    async with pair(like, blocks=int(1.2 * longest / 16)) as (p, d):

        async def one(i):
            ids = prompt([20, 100, 250, longest][i % 4], seed=i % 11)
            output: list[int] = []
            for attempt in range(1, 60):
                id = AttemptId(bytes([i]) * 16, 1, 100 * attempt)
                prefill, decode = await request(
                    p, d, ids, like, id=id, output=output, max_tokens=40
                )  # fmt: skip
                for stage in (prefill, decode):
                    if stage is not None:
                        await stage.ended()
                if decode is None:
                    continue
                output += decode.tokens
                if decode.end.WhichOneof("end") == "finished":
                    return output == reference_tokens(ids, 40, VOCABULARY)
                assert decode.end.WhichOneof("end") in ("returned", "transfer_failed")
            return False

        async with asyncio.timeout(300):
            right = await asyncio.gather(*(one(i) for i in range(32)))
        assert all(right)
        await p.idle()
        await d.idle()


async def test_a_first_token_that_ends_the_request_ends_it_on_prefill() -> None:
    async with pair() as (p, d):
        first = reference_tokens(prompt(50), 1, VOCABULARY)
        prefill, decode = await request(p, d, prompt(50), stop_token_ids=first)
        assert await prefill.ended() == "finished"
        assert prefill.tokens == first
        assert await decode.ended() == "transfer_failed"
        assert decode.tokens == []
        await p.idle()
        await d.idle()


async def test_a_corrupted_transfer_would_show() -> None:
    """The first decode step reads what came: a wrong block gives wrong tokens."""
    import numpy as np

    async with pair() as (p, d):
        # Cached on decode and damaged there: the transfer brings the rest only.
        await d.place(prompt(100), max_tokens=1).ended()
        await d.idle()
        memory = np.frombuffer(d.engine._memory, np.uint8)
        slot = next(s for s in range(d.engine._pool.blocks) if d.engine._pool.parent[s] != -1)
        memory[slot * 1024 + 100] ^= 4
        del memory
        _, decode = await request(p, d, prompt(120))
        await decode.ended()
        assert decode.tokens[1:] != reference_tokens(prompt(120), 16, VOCABULARY)[1:]


async def test_prefill_that_never_comes_fails_the_transfer() -> None:
    async with pair(node={"offer_timeout_s": 0.2}) as (p, d):
        d.halt_when(lambda: any(a.opening is not None for a in d.attempts.values()))
        decode = d.place(prompt(50), Stage.DECODE, hand_off=hand_off_from(p))
        await d.halted()
        assert not decode.refused
        assert d.engine.load().kv.reserved > 0
        d.go_on()
        assert await decode.ended() == "transfer_failed"
        await d.idle()


async def test_a_cancelled_decode_stops_its_prefill() -> None:
    # Slow enough that prefill is never done first; its end comes between layers.
    async with pair(profile="step-10ms", speed=0.02) as (p, d):
        prefill, decode = await request(p, d, prompt(6000), max_tokens=8)
        await prefill.opened()
        d.engine.cancel([decode.id])
        assert await decode.ended() == "cancelled"
        assert await prefill.ended() == "transfer_failed"
        await p.idle()
        await d.idle()


async def test_a_cancelled_prefill_fails_the_transfer(tmp_path) -> None:
    stuck = tmp_path / "stuck"
    stuck.touch()
    async with pair(stuck_while=str(stuck)) as (p, d):
        prefill, decode = await request(p, d, prompt(6000), max_tokens=8)
        await prefill.opened()
        p.engine.cancel([prefill.id])
        # Its first layer ends only now.
        stuck.unlink()
        assert await prefill.ended() == "cancelled"
        assert await decode.ended() == "transfer_failed"
        await p.idle()
        await d.idle()


async def test_an_aborted_transfer_refuses_a_later_prefill(tmp_path) -> None:
    stuck = tmp_path / "stuck"
    stuck.touch()
    async with pair(stuck_while=str(stuck)) as (p, _):
        hand_off = hand_off_from(p)
        first = p.place(prompt(3000), Stage.PREFILL, hand_off=hand_off)
        await first.opened()
        p.engine.cancel([first.id])
        stuck.unlink()
        assert await first.ended() == "cancelled"
        late = p.place(prompt(50), Stage.PREFILL, hand_off=hand_off)
        assert await late.ended() == "refused"
        assert late.opening.refused.reason == wire.REFUSAL_REASON_UNKNOWN_TRANSFER


@pytest.mark.parametrize("side", ["p", "d", "both"])
@pytest.mark.parametrize("after", range(0, 60, 3))
async def test_cancel_at_any_moment_leaves_nothing(side, after) -> None:
    async with pair(profile="step-10ms", speed=20) as (p, d):
        prefill, decode = await request(p, d, prompt(3000), max_tokens=30)
        for _ in range(after):
            await asyncio.sleep(0)
        if side != "d":
            p.engine.cancel([prefill.id])
        if side != "p":
            d.engine.cancel([decode.id])
        await prefill.ended()
        await decode.ended()
        expected = reference_tokens(prompt(3000), 30, VOCABULARY)
        assert decode.tokens == expected[: len(decode.tokens)]
        await p.idle()
        await d.idle()


async def test_a_prefix_is_pulled_from_any_holder() -> None:
    async with pair() as (holder, asker):
        await holder.place(prompt(300), max_tokens=1).ended()
        source = wire.PrefixSource(
            worker="p", incarnation=11, address=holder.engine.transfer_address, tokens=288
        )
        attempt = asker.place(prompt(320), prefix_from=source, max_tokens=20)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == reference_tokens(prompt(320), 20, VOCABULARY)
        assert attempt.end.timings.pulled_tokens == 288
        assert attempt.end.timings.computed_tokens == 32
        await holder.idle()
        await asker.idle()


@pytest.mark.parametrize(
    ("here", "there", "pulled"),
    [
        ({"lora": "1" * 64}, {"lora": "1" * 64}, 288),
        # One name, two adapters: their KV has nothing in common.
        ({"lora": "1" * 64}, {"lora": "2" * 64}, 0),
        ({"lora": "1" * 64}, {}, 0),
        # Who does not know its digest says none: it is not compared.
        ({}, {"lora": "2" * 64}, 288),
    ],
)
async def test_a_prefix_is_pulled_only_where_its_adapter_is_the_same(here, there, pulled) -> None:
    own = {"transfer": True, "worker_id": "d", "incarnation": 22, "adapters": here}
    peer = {"transfer": True, "worker_id": "p", "incarnation": 11, "adapters": there}
    async with running(sim(**peer)) as holder, running(sim(**own)) as asker:
        await holder.place(prompt(300), max_tokens=1, adapter="lora").ended()
        source = wire.PrefixSource(
            worker="p", incarnation=11, address=holder.engine.transfer_address, tokens=288
        )
        attempt = asker.place(prompt(320), prefix_from=source, max_tokens=20, adapter="lora")
        assert await attempt.ended() == "finished"
        assert attempt.tokens == reference_tokens(prompt(320), 20, VOCABULARY)
        assert attempt.end.timings.pulled_tokens == pulled
        assert attempt.end.timings.computed_tokens == 320 - pulled
        await holder.idle()
        await asker.idle()


async def test_a_pull_tells_the_holder_which_request_it_is_for(monkeypatch) -> None:
    told = {}
    take = Admission.transfer_event

    def listening(admission, event) -> None:
        if isinstance(event, Pulled | PrefixWanted):
            told[type(event)] = (event.request_id, event.traceparent)
        take(admission, event)

    monkeypatch.setattr(Admission, "transfer_event", listening)
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0{}"
    async with pair() as (p, d):
        # Only decode knows the names: what prefill sees came with the pull.
        hand_off = hand_off_from(p)
        names = {"request_id": "whole", "traceparent": trace.format(0)}
        decode = d.place(prompt(100), Stage.DECODE, hand_off=hand_off, **names)
        p.place(prompt(100), Stage.PREFILL, id=decode.id, hand_off=hand_off)
        assert await decode.ended() == "finished"
        assert told.pop(Pulled) == ("whole", trace.format(0))
        await p.place(prompt(300, 1), max_tokens=1).ended()
        source = wire.PrefixSource(
            worker="p", incarnation=11, address=p.engine.transfer_address, tokens=288
        )
        names = {"request_id": "prefix", "traceparent": trace.format(1)}
        asker = d.place(prompt(320, 1), prefix_from=source, **names)
        assert await asker.ended() == "finished"
        assert told == {PrefixWanted: ("prefix", trace.format(1))}
        await p.idle()
        await d.idle()


async def test_a_holder_that_has_less_or_is_gone_costs_only_time() -> None:
    async with pair() as (holder, asker):
        await holder.place(prompt(100), max_tokens=1).ended()
        for address, tokens in ((holder.engine.transfer_address, 288), ("127.0.0.1:1", 288)):
            source = wire.PrefixSource(worker="p", incarnation=11, address=address, tokens=tokens)
            attempt = asker.place(
                prompt(320), prefix_from=source, max_tokens=9, cache_salt=address and str(tokens)
            )
            assert await attempt.ended() == "finished"
            assert attempt.tokens == reference_tokens(prompt(320), 9, VOCABULARY)
        await holder.idle()
        await asker.idle()


async def test_no_room_is_said_at_once_and_holds_nothing() -> None:
    async with pair(blocks=30) as (p, d):
        first = d.place(prompt(300), Stage.DECODE, hand_off=hand_off_from(p))
        await first.opened()
        second = d.place(prompt(300, 1), Stage.DECODE, hand_off=hand_off_from(p))
        assert await second.ended() == "refused"
        assert second.opening.refused.reason == wire.REFUSAL_REASON_NO_ROOM
        d.engine.cancel([first.id])
        await first.ended()
        await d.idle()


async def test_a_dead_sender_fails_the_transfer() -> None:
    async with running(sim(transfer=True, worker_id="d")) as d:
        async with running(
            # Slow enough that it is never done before it dies.
            sim(transfer=True, worker_id="p", incarnation=11, profile="step-10ms", speed=0.02)
        ) as p:
            _, decode = await request(p, d, prompt(5000), max_tokens=8)
            await decode.opened()
        assert await decode.ended() == "transfer_failed"
        await d.idle()


@pytest.mark.parametrize("lease_s", [0.2, 600.0], ids=["over", "in force"])
async def test_an_offer_that_nobody_pulls_is_held_as_long_as_its_lease(lease_s) -> None:
    async with pair(node={"lease_s": lease_s}) as (p, d):
        prefill = p.place(prompt(300), Stage.PREFILL, hand_off=hand_off_from(p))
        assert await prefill.ended() == "handed_off"
        if lease_s > 1:
            assert p.engine.residue().transfers == 1
            assert p.engine.load().kv.pinned == 19
            return
        await p.idle()
        # What was pinned is cached prefix now, and serves the next request.
        again = p.place(prompt(300))
        assert await again.ended() == "finished"
        assert again.end.timings.cached_tokens == 288
        await p.idle()
        await d.idle()


@pytest.mark.parametrize("side", ["p", "d"])
@pytest.mark.parametrize("state", ["reserved", "flowing", "committed"])
async def test_blocks_of_a_cancelled_side_serve_others_at_once(state, side) -> None:
    """Both pools hold little more than the hand-off: others take its blocks."""
    # Only there it ends the transfer.
    node = {"offer_timeout_s": 2.0} if (state, side) == ("reserved", "p") else {}
    async with pair(blocks=40, profile="step-10ms", speed=2, node=node) as (p, d):
        if state == "committed" and side == "d":
            # It stands still until its cancel is there.
            d.halt_when(lambda: any(len(a.tokens) >= 2 for a in d.attempts.values()))
        hand_off, ids = hand_off_from(p), prompt(500)
        decode = d.place(ids, Stage.DECODE, hand_off=hand_off, max_tokens=400)
        await decode.opened()
        prefill = None
        if state != "reserved":
            prefill = p.place(ids, Stage.PREFILL, id=decode.id, hand_off=hand_off, max_tokens=400)
            await prefill.opened()
        if state == "committed":
            assert await prefill.ended() == "handed_off"
            await decode.until(lambda a: len(a.tokens) >= 2)
        if side == "d":
            d.engine.cancel([decode.id])
            d.go_on()
            assert await decode.ended() == "cancelled"
        elif prefill is not None:
            p.engine.cancel([prefill.id])
            await prefill.ended()
        others = [driver.place(prompt(500, seed=9), max_tokens=20) for driver in (p, d)]
        for other in others:
            # Where the other side still holds its room, the prompt waits for it.
            if side == "d" or state != "committed":
                assert await other.ended() == "finished"
                assert other.tokens == reference_tokens(prompt(500, seed=9), 20, VOCABULARY)
        if side == "p" and state == "committed":
            assert await decode.ended() in ("finished", "returned")
            assert await others[0].ended() == await others[1].ended() == "finished"
        assert decode.tokens == reference_tokens(ids, 400, VOCABULARY)[: len(decode.tokens)]
        if decode.end is None:
            assert await decode.ended() == "transfer_failed"
        await p.idle()
        await d.idle()
