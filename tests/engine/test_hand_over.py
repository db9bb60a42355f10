"""A running stream passes from one engine to another with its KV."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
from engine_harness import VOCABULARY, mesh_from, prompt, running, sim, until
from tiny_torch import SAMPLING, engine_of

from kvmesh.engine.contract import AttemptId, Stage
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import WorkerSettings

STEPS = {"profile": "step-10ms", "speed": 5}


@asynccontextmanager
async def pair(like="kvmesh", blocks=512, target_speed=None, **settings):
    """A worker that has streams and one that gets them."""
    settings = {**STEPS, **settings}
    source = sim(like, blocks=blocks, transfer=True, worker_id="s", incarnation=11, **settings)
    settings["speed"] = target_speed or settings["speed"]
    target = sim(like, blocks=blocks, transfer=True, worker_id="t", incarnation=22, **settings)
    async with running(source) as s, running(target) as t:
        yield s, t


async def begin(source, ids, tokens=3, **continuation):
    """A stream that has made some tokens. Its engine stands still then, until `go_on`: it has
    room for some more alone, and a target may need any time for its answer."""
    begun = []
    source.halt_when(lambda: begun and len(begun[0].tokens) >= tokens)
    begun.append(source.place(ids, **continuation))
    await source.halted()
    return begun[0]


async def reserve(target, source, ids, stream, attempt=2, hand_off=None, **continuation):
    """Room for a stream at its target, as a router asks for it; with the border."""
    hand_off = hand_off or mesh_from(source.engine, "s", 11)
    given = list(stream.tokens)
    before = source.engine._node.residue()["awaited"]
    id = AttemptId(stream.id.generation, 1, attempt)
    receiver = target.place(
        ids, Stage.DECODE, id=id, output=given, hand_off=hand_off, **continuation
    )
    assert (await receiver.opened()).HasField("reserved")
    await until(lambda: source.engine._node.residue()["awaited"] > before)
    return receiver, hand_off, len(given)


def whole(stream, receiver):
    """The output as a router puts it together; both say the same of what both say."""
    border = receiver.border
    both = min(len(stream.tokens) - border, len(receiver.tokens))
    assert receiver.tokens[:both] == stream.tokens[border : border + both]
    assert len(receiver.tokens) >= len(stream.tokens) - border, "the commit carries all"
    return stream.tokens[:border] + receiver.tokens


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 1000])
async def test_a_stream_goes_on_elsewhere_with_the_tokens_of_one_engine(length) -> None:
    async with pair() as (s, t):
        ids = prompt(length)
        stream = await begin(s, ids, max_tokens=200)
        receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=200)
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await stream.ended() == "handed_off"
        assert await receiver.ended() == "finished"
        assert whole(stream, receiver) == reference_tokens(ids, 200, VOCABULARY)
        assert stream.end.handed_off.tokens_committed == len(stream.tokens) - border
        # Nothing is computed again.
        assert receiver.end.timings.computed_tokens == 0
        await s.idle()
        await t.idle()


async def test_blocks_that_fill_while_it_copies_come_too() -> None:
    # The receiver's processor is busy: what fills meanwhile is more than one block.
    async with pair(speed=20) as (s, t):
        ids = prompt(4000)
        stream = await begin(s, ids, max_tokens=400)
        receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=400)
        # The router's command is late: there is room for 64 tokens.
        s.halt_when(lambda: len(stream.tokens) >= border + 40)
        await s.halted()
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await stream.ended() == "handed_off"
        assert await receiver.ended() == "finished"
        assert whole(stream, receiver) == reference_tokens(ids, 400, VOCABULARY)
        await s.idle()
        await t.idle()


async def test_streams_beside_it_decode_on_and_all_go_at_last() -> None:
    async with pair() as (s, t):
        prompts = [prompt(100 + 7 * i, seed=i) for i in range(6)]
        streams = [await begin(s, ids, max_tokens=300) for ids in prompts]
        receivers = []
        for ids, stream in zip(prompts, streams, strict=True):
            receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=300)
            s.engine.hand_over(stream.id, 2, hand_off, border)
            receivers.append(receiver)
        s.go_on()
        for ids, stream, receiver in zip(prompts, streams, receivers, strict=True):
            assert await stream.ended() == "handed_off"
            assert await receiver.ended() == "finished"
            assert whole(stream, receiver) == reference_tokens(ids, 300, VOCABULARY)
        await s.idle()
        await t.idle()


def real_pair(folder):
    return (
        engine_of(folder, transfer=True, worker_id="s", incarnation=11),
        engine_of(folder, transfer=True, worker_id="t", incarnation=22),
    )


async def handed_over(source, target, ids, asked):
    """A stream that passes on in the middle: its whole output, and the one of the same request
    at one engine alone."""
    async with running(source) as s, running(target) as t:
        alone = t.place(ids, cache_salt="alone", **asked)
        assert await alone.ended() == "finished"
        stream = await begin(s, ids, **asked)
        receiver, hand_off, border = await reserve(t, s, ids, stream, **asked)
        s.halt_when(lambda: len(stream.tokens) >= border + 5)
        await s.halted()
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await stream.ended() == "handed_off"
        assert await receiver.ended() == "finished"
        assert receiver.end.timings.computed_tokens == 0
        # Of what both say the target says what the source said.
        both = len(stream.tokens) - border
        assert both >= 5
        assert receiver.logprobs[:both] == stream.logprobs[border:]
        assert len(receiver.logprobs) == len(receiver.tokens)
        await s.idle()
        await t.idle()
        return whole(stream, receiver), alone.tokens


@pytest.mark.parametrize("length", [5, 16, 130])
async def test_a_real_model_goes_on_with_its_tokens_and_their_log_probabilities(
    folder, length
) -> None:
    asked = {"max_tokens": 200, "logprobs": 2, **SAMPLING}
    output, alone = await handed_over(*real_pair(folder), prompt(length), asked)
    assert output == alone


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_sampled_stream_of_a_real_model_goes_on_with_the_draws_of_its_seed(
    folder, seed
) -> None:
    """The noise of a draw hangs on seed, position and token, not on who draws."""

    def drawn(seed: int) -> dict:
        return {
            "max_tokens": 200,
            "logprobs": 2,
            "sampling": wire.ResolvedSampling(
                repetition_penalty=1, top_p=0.95, temperature=1.2, seed=seed
            ),
        }

    output, alone = await handed_over(*real_pair(folder), prompt(100), drawn(seed))
    assert output == alone
    # It was drawn, and by that seed.
    other, _ = await handed_over(*real_pair(folder), prompt(100), drawn(seed + 100))
    assert other[:20] != output[:20]


@pytest.mark.parametrize(
    ("dtype", "reproducible"), [("float32", True), ("bfloat16", False), ("float16", False)]
)
async def test_a_stream_goes_on_validly_in_each_precision_and_only_the_exact_one_promises_more(
    folder, dtype, reproducible
) -> None:
    """As a worker serves it. Each token is one of the best after those before it."""
    import torch
    import transformers

    from kvmesh.engine.torch import served

    def engine(name, incarnation):
        settings = WorkerSettings(
            engine="torch", model=folder, dtype=dtype, threads=1, kv_pool_tokens=4096
        )
        return served.build(settings, name, incarnation, lambda _: None).engine

    source, target = engine("s", 11), engine("t", 22)
    assert source.capabilities().reproducible is reproducible
    ids = prompt(100)
    asked = {"max_tokens": 150, "logprobs": 2, **SAMPLING}
    output, alone = await handed_over(source, target, ids, asked)
    assert len(output) == 150
    if reproducible:
        assert output == alone
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()

    def worst(output) -> float:
        """How far behind the best a choice was at most, as a share of all that logits span."""
        with torch.inference_mode():
            logits = model(torch.tensor([ids + output[:-1]])).logits[0, len(ids) - 1 :]
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        return float(((logits.amax(1) - chosen) / (logits.amax(1) - logits.amin(1))).max())

    assert worst(output) < (1e-4 if reproducible else 0.15)
    # One that was lost would show.
    assert worst(output[:75] + output[76:]) > 0.3


async def test_a_transfer_that_fails_before_the_commit_changes_nothing() -> None:
    async with pair() as (s, t):
        ids = prompt(60)
        stream = await begin(s, ids, max_tokens=150)
        receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=150)
        # Gone before the source hears of it: its offer finds the transfer aborted.
        t.engine.cancel([receiver.id])
        assert await receiver.ended() == "cancelled"
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await stream.ended() == "finished"
        assert stream.tokens == reference_tokens(ids, 150, VOCABULARY)
        await s.idle()
        await t.idle()


async def test_a_receiver_that_never_comes_is_not_waited_for() -> None:
    async with pair() as (s, t):
        ids = prompt(60)
        stream = await begin(s, ids, max_tokens=200)
        s.engine.hand_over(stream.id, 2, mesh_from(s.engine, "s", 11), len(stream.tokens))
        s.go_on()
        assert await stream.ended() == "finished"
        assert stream.tokens == reference_tokens(ids, 200, VOCABULARY)
        await s.idle()
        await t.idle()


async def test_a_second_command_takes_the_place_of_the_first() -> None:
    async with pair() as (s, t):
        ids = prompt(60)
        stream = await begin(s, ids, max_tokens=200)
        s.engine.hand_over(stream.id, 2, mesh_from(s.engine, "s", 11), len(stream.tokens))
        receiver, hand_off, border = await reserve(t, s, ids, stream, attempt=3, max_tokens=200)
        for _ in range(2):
            # Said again, where a session broke: it is one command.
            s.engine.hand_over(stream.id, 3, hand_off, border)
        s.go_on()
        assert await stream.ended() == "handed_off"
        assert await receiver.ended() == "finished"
        assert whole(stream, receiver) == reference_tokens(ids, 200, VOCABULARY)
        await s.idle()
        await t.idle()


@pytest.mark.parametrize("side", ["source", "receiver", "both"])
async def test_a_cancel_in_the_middle_frees_both_sides(side) -> None:
    async with pair() as (s, t):
        ids = prompt(3000)
        stream = await begin(s, ids, max_tokens=400)
        receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=400)
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        if side in ("source", "both"):
            s.engine.cancel([stream.id])
        if side in ("receiver", "both"):
            t.engine.cancel([receiver.id])
        assert await receiver.ended() in ("cancelled", "transfer_failed", "finished")
        # It may have passed before the cancel came.
        assert await stream.ended() in ("cancelled", "handed_off", "finished")
        await s.idle()
        await t.idle()


async def test_a_stream_that_ends_while_it_copies_ends_the_hand_over() -> None:
    async with pair(speed=1) as (s, t):
        ids = prompt(40)
        stream = await begin(s, ids, max_tokens=6)
        # One that waits for the receiver, which has not asked yet.
        hand_off = mesh_from(s.engine, "s", 11)
        s.engine.hand_over(stream.id, 2, hand_off, len(stream.tokens))
        s.go_on()
        assert await stream.ended() == "finished"
        late = t.place(
            ids, Stage.DECODE, id=AttemptId(stream.id.generation, 1, 2),
            output=stream.tokens[:3], hand_off=hand_off, max_tokens=6,
        )  # fmt: skip
        assert await late.ended() in ("transfer_failed", "refused")
        assert stream.tokens == reference_tokens(ids, 6, VOCABULARY)
        await s.idle()
        await t.idle()


@pytest.mark.parametrize("what", ["unknown", "prefilling"])
async def test_who_is_not_there_is_told_at_once(what) -> None:
    # An offer that never came would be waited for much longer than this test.
    async with pair(node={"offer_timeout_s": 600.0}, speed=1) as (s, t):
        ids = prompt(2000 if what == "prefilling" else 20)
        if what == "prefilling":
            s.halt_when(lambda: any(a.opening is not None for a in s.attempts.values()))
        stream = s.place(ids, max_tokens=4)
        if what == "unknown":
            assert await stream.ended() == "finished"
        else:
            await s.halted()
        receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=30)
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await receiver.ended() == "transfer_failed"
        assert "no such stream" in receiver.end.transfer_failed.message
        assert await stream.ended() == "finished"
        await s.idle()
        await t.idle()


async def test_an_engine_whose_hand_offs_are_its_own_keeps_its_streams() -> None:
    async with pair("vllm") as (s, t):
        stream = await begin(s, prompt(50), max_tokens=100)
        s.engine.hand_over(stream.id, 2, mesh_from(s.engine, "s", 11), 3)
        s.go_on()
        assert await stream.ended() == "finished"
        assert stream.tokens == reference_tokens(prompt(50), 100, VOCABULARY)
        await s.idle()
        await t.idle()


async def test_a_stream_passes_on_and_on() -> None:
    async with pair() as (s, t):
        ids = prompt(90)
        stream = await begin(s, ids, max_tokens=300)
        first, hand_off, border = await reserve(t, s, ids, stream, max_tokens=300)
        t.halt_when(lambda: len(first.tokens) >= 40)
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await stream.ended() == "handed_off"
        await t.halted()
        so_far = whole(stream, first)
        id = AttemptId(stream.id.generation, 1, 3)
        back = mesh_from(t.engine, "t", 22)
        second = s.place(ids, Stage.DECODE, id=id, output=so_far, hand_off=back, max_tokens=300)
        opening = await second.opened()
        # What it had itself is still there.
        assert opening.reserved.tokens_held >= len(ids) // 16 * 16
        await until(lambda: t.engine._node.residue()["awaited"])
        t.engine.hand_over(first.id, 3, back, len(so_far))
        t.go_on()
        assert await first.ended() == "handed_off"
        assert await second.ended() == "finished"
        assert so_far + second.tokens == reference_tokens(ids, 300, VOCABULARY)
        await s.idle()
        await t.idle()


async def test_a_source_that_dies_fails_the_transfer() -> None:
    async with running(sim(transfer=True, worker_id="t", **STEPS)) as t:
        async with running(
            sim(transfer=True, worker_id="s", incarnation=11, profile="step-10ms", speed=0.2)
        ) as s:
            stream = await begin(s, prompt(50), max_tokens=400)
            receiver, _, _ = await reserve(t, s, prompt(50), stream, max_tokens=400)
        assert await receiver.ended() == "transfer_failed"
        await t.idle()


async def test_what_came_wrong_would_show() -> None:
    """The first step behind a hand-over reads what came."""
    async with pair() as (s, t):
        ids = prompt(100)
        # Cached at the target, and damaged there: the transfer brings the rest only.
        await t.place(ids, max_tokens=1).ended()
        await t.idle()
        stream = await begin(s, ids, max_tokens=60)
        memory = np.frombuffer(t.engine._memory, np.uint8)
        slot = next(i for i in range(t.engine._pool.blocks) if t.engine._pool.parent[i] != -1)
        memory[slot * 1024 + 100] ^= 4
        del memory
        receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=60)
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await stream.ended() == "handed_off"
        assert await receiver.ended() == "finished"
        assert whole(stream, receiver) != reference_tokens(ids, 60, VOCABULARY)
        await s.idle()
        await t.idle()


async def test_a_full_target_refuses_and_the_stream_stays() -> None:
    async with pair(blocks=40, target_speed=0.1) as (s, t):
        ids = prompt(200)
        other = t.place(prompt(400, seed=3), max_tokens=200)
        await other.until(lambda a: a.tokens)
        stream = await begin(s, ids, max_tokens=60)
        hand_off = mesh_from(s.engine, "s", 11)
        receiver = t.place(
            ids, Stage.DECODE, id=AttemptId(stream.id.generation, 1, 2),
            output=list(stream.tokens), hand_off=hand_off, max_tokens=60,
        )  # fmt: skip
        assert await receiver.ended() == "refused"
        assert receiver.opening.refused.reason == wire.REFUSAL_REASON_NO_ROOM
        s.go_on()
        assert await stream.ended() == "finished"
        assert stream.tokens == reference_tokens(ids, 60, VOCABULARY)
        t.engine.cancel([other.id])
        await s.idle()
        await t.idle()


async def test_pins_go_when_the_receiver_has_everything() -> None:
    async with pair() as (s, t):
        ids = prompt(300)
        stream = await begin(s, ids, max_tokens=200)
        receiver, hand_off, border = await reserve(t, s, ids, stream, max_tokens=200)
        s.engine.hand_over(stream.id, 2, hand_off, border)
        s.go_on()
        assert await stream.ended() == "handed_off"
        await until(lambda: s.engine.load().kv.pinned == 0)
        assert s.engine.load().kv.running == 0
        await asyncio.gather(receiver.ended())
        await s.idle()
        await t.idle()
