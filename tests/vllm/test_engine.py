"""What the engine contract asks (engine/contract.py), with a core that is no vLLM."""

import asyncio
import time

import pytest
from engine_harness import running, until
from fake_core import CONNECTOR, engine, tokens_after

from kvmesh.engine.contract import AttemptId, Stage
from kvmesh.engine.vllm import warm_up
from kvmesh.engine.vllm.engine import VllmEngine
from kvmesh.engine.vllm.loop import Nobody
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import SettingError

SAMPLING = {"sampling": wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0)}


def prompt(length, seed=0):
    return [(seed * 131 + at * 7) % 1999 + 1 for at in range(length)]


def place(driver, ids, *args, **more):
    return driver.place(ids, *args, **{**SAMPLING, **more})


async def test_every_token_comes_once_and_in_columns() -> None:
    async with running(engine()) as driver:
        attempts = [place(driver, prompt(40, at), max_tokens=8) for at in range(5)]
        for at, attempt in enumerate(attempts):
            assert await attempt.ended() == "finished"
            assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH
            assert attempt.tokens == tokens_after(prompt(40, at), 8)
        await driver.idle()


async def test_a_continuation_goes_on_where_it_was() -> None:
    whole = tokens_after(prompt(50), 30)
    async with running(engine()) as driver:
        attempt = place(driver, prompt(50), output=whole[:11], max_tokens=30)
        await attempt.ended()
        assert attempt.tokens == whole[11:]


async def test_a_stop_id_ends_the_output_and_is_told() -> None:
    said = tokens_after(prompt(20), 10)
    async with running(engine()) as driver:
        attempt = place(driver, prompt(20), stop_token_ids=[said[6]], max_tokens=16)
        await attempt.ended()
        assert attempt.tokens == said[:7]
        assert attempt.end.finished.reason == inference.FINISH_REASON_STOP
        assert attempt.end.finished.stop_token_id == said[6]


async def test_log_probabilities_are_of_the_token_and_of_the_likeliest() -> None:
    async with running(engine()) as driver:
        attempt = place(driver, prompt(20), max_tokens=2, logprobs=3)
        await attempt.ended()
        assert len(attempt.logprobs) == 2
        assert attempt.logprobs[0].logprob == 0.0
        assert list(attempt.logprobs[0].top_ids) == [0, 1, 2]
        assert list(attempt.logprobs[0].top_logprobs) == [-1.0, -2.0, -3.0]


async def test_samples_tell_what_steps_held() -> None:
    async with running(engine(step_tokens=64)) as driver:
        attempt = place(driver, prompt(100), max_tokens=10)
        await attempt.ended()
        await driver.idle()
        assert sum(s.prefill_tokens for s in driver.samples) == 100
        assert sum(s.prefill_context for s in driver.samples) == sum(range(1, 101))
        assert sum(s.decode_batch for s in driver.samples) == 9
        assert sum(s.decode_context for s in driver.samples) == sum(range(101, 110))


async def test_load_counts_what_runs_and_returns_to_nothing() -> None:
    async with running(engine(step_s=0.002)) as driver:
        attempt = place(driver, prompt(100), max_tokens=1000)
        await attempt.until(lambda a: len(a.tokens) >= 5)
        share = driver.engine.load().shares["router"]
        assert share.decoding == 1
        assert share.standard.decoding == 1
        assert 104 <= share.decode_context <= 1100
        assert driver.engine.load().kv.running >= 4
        driver.engine.cancel([attempt.id])
        assert await attempt.ended() == "cancelled"
        await driver.idle()
        assert driver.engine.load().shares == {}


async def test_an_urgent_prompt_has_the_lower_priority_number() -> None:
    async with running(engine(step_s=0.002)) as driver:
        began = time.monotonic()
        later = place(driver, prompt(30), max_tokens=10_000, deadline_ms=5000.0)
        sooner = place(driver, prompt(30, 1), max_tokens=10_000, deadline_ms=0.0)
        took_ms = (time.monotonic() - began) * 1000
        await sooner.until(lambda a: a.tokens)
        requests = driver.engine.core.running
        by_prompt = {tuple(r.prompt): r.priority for r in requests.values()}
        late, soon = by_prompt[tuple(prompt(30))], by_prompt[tuple(prompt(30, 1))]
        # The second came so much later.
        assert 5000 - took_ms - 1 <= late - soon <= 5000
        driver.engine.cancel([later.id, sooner.id])
        await driver.idle()


@pytest.mark.parametrize(
    ("given", "field", "text"),
    [
        ({"ids": []}, "", "empty"),
        ({"ids": [5, 2000, 7]}, "", "under 2000"),
        ({"ids": prompt(3200)}, "", "the limit is 3200"),
        ({"ids": [5], "adapter": "poet"}, "model", "no adapter 'poet'"),
        (
            {"ids": [5], "sampling": wire.ResolvedSampling(top_p=1.0, top_k=5000)},
            "sampling.top_k",
            "top_k is too large",
        ),
        (
            {"ids": [5], "sampling": wire.ResolvedSampling(temperature=9)},
            "sampling.temperature",
            "",
        ),
    ],
)
async def test_what_cannot_be_run_is_refused_by_name(given, field, text) -> None:
    async with running(engine()) as driver:
        attempt = place(driver, given.pop("ids"), **given)
        assert await attempt.ended() == "refused"
        assert attempt.opening.refused.reason == wire.REFUSAL_REASON_UNSUPPORTED
        assert attempt.opening.refused.field == field
        assert text in attempt.opening.refused.message
        await driver.idle()


async def test_a_suspect_shares_its_steps_with_nobody() -> None:
    async with running(engine(step_s=0.001)) as driver:
        others = [place(driver, prompt(30, at), max_tokens=30) for at in range(3)]
        suspect = place(driver, prompt(40, 9), alone=True, max_tokens=60)
        behind = place(driver, prompt(30, 5), max_tokens=5)
        for attempt in (*others, suspect, behind):
            assert await attempt.ended() == "finished"
        name = f"{suspect.id.generation.hex()}-1-1"
        lonely = [batch for batch in driver.engine.core.batches if batch == [name]]
        shared = [b for b in driver.engine.core.batches if name in b and len(b) > 1]
        assert len(lonely) >= 32
        assert len(shared) <= 6, "only after its first 32 tokens"
        await driver.idle()


async def test_a_suspect_that_is_cancelled_lets_the_others_go_on() -> None:
    async with running(engine(step_s=0.001)) as driver:
        first = place(driver, prompt(30), max_tokens=10_000)
        await first.until(lambda a: a.tokens)
        suspect = place(driver, prompt(40), alone=True)
        behind = place(driver, prompt(30, 5), max_tokens=5)
        await behind.opened()
        driver.engine.cancel([suspect.id])
        assert await suspect.ended() == "cancelled"
        assert await behind.ended() == "finished"
        driver.engine.cancel([first.id])
        await driver.idle()


# -- hand-offs -----------------------------------------------------------------


async def handed_off(driver, ids, **more):
    """The hand-off of a prompt that was computed there."""
    attempt = place(driver, ids, Stage.PREFILL, **more)
    assert await attempt.ended() == "handed_off"
    assert attempt.tokens == [], "decode draws the first token"
    return wire.HandOff(engine=attempt.end.handed_off.engine)


async def test_decode_gives_what_one_engine_gives_and_the_blocks_go() -> None:
    async with (
        running(engine(CONNECTOR)) as prefill,
        running(engine(CONNECTOR)) as decode,
    ):
        hand_off = await handed_off(prefill, prompt(100), stop_token_ids=[next_of(100)])
        await until(lambda: prefill.engine.load().kv.pinned == 4)
        assert prefill.engine.residue().requests == 0
        attempt = place(decode, prompt(100), Stage.DECODE, hand_off=hand_off, max_tokens=6)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == tokens_after(prompt(100), 6)
        assert decode.engine.core.released == [*prefill.engine.core.kept]
        prefill.engine.core.let_go()
        await prefill.idle()
        await decode.idle()


def next_of(length):
    return tokens_after(prompt(length), 1)[0]


async def test_an_expired_hand_off_is_computed_by_decode() -> None:
    async with (
        running(engine(CONNECTOR, lease_ms=1000.0)) as prefill,
        running(engine(CONNECTOR)) as decode,
    ):
        hand_off = await handed_off(prefill, prompt(100))
        late = place(
            decode, prompt(100), Stage.DECODE, hand_off=hand_off, waited_ms=60_000.0, max_tokens=6
        )
        assert await late.ended() == "finished"
        assert late.tokens == tokens_after(prompt(100), 6)
        assert decode.engine.core.released == [], "what is another's by now is not touched"
        assert late.end.timings.computed_tokens == 100


class Clock:
    """Time that can be put forward."""

    ahead_s = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead_s


@pytest.mark.parametrize("ahead_s", [0.0, 31.0])
async def test_a_hand_off_that_expires_before_it_is_let_in_is_computed_by_decode(ahead_s) -> None:
    clock = Clock()
    async with (
        running(engine(CONNECTOR, lease_ms=60_000.0)) as prefill,
        running(engine(CONNECTOR, clock=clock, step_s=0.001)) as decode,
    ):
        hand_offs = [await handed_off(prefill, prompt(100, seed)) for seed in range(2)]
        running_one = place(decode, prompt(30), max_tokens=10_000)
        await running_one.until(lambda a: a.tokens)
        # Behind a suspect an ordinary one waits as long.
        held = [
            place(decode, prompt(100, seed), Stage.DECODE, hand_off=hand_off, alone=not seed)
            for seed, hand_off in enumerate(hand_offs)
        ]
        for attempt in held:
            await attempt.opened()
        clock.ahead_s = ahead_s
        decode.engine.cancel([running_one.id])
        for seed, attempt in enumerate(held):
            assert await attempt.ended() == "finished"
            assert attempt.tokens == tokens_after(prompt(100, seed), 16)
        taken = [] if ahead_s else [*prefill.engine.core.kept]
        assert decode.engine.core.released == taken, "what is another's by now is not touched"


async def test_a_hand_off_expires_while_its_placement_waits_to_be_looked_at() -> None:
    async with (
        running(engine(CONNECTOR, lease_ms=60_000.0)) as prefill,
        running(engine(CONNECTOR)) as decode,
    ):
        hand_off = await handed_off(prefill, prompt(100))
        late = place(
            decode, prompt(100), Stage.DECODE, hand_off=hand_off,
            received_at=time.monotonic() - 31.0,
        )  # fmt: skip
        assert await late.ended() == "finished"
        assert decode.engine.core.released == []


async def test_a_cancel_right_after_the_place_is_told_after_the_request() -> None:
    """Never before: else nobody would tell the sender that its blocks can go."""
    async with (
        running(engine(CONNECTOR, step_s=0.01)) as prefill,
        running(engine(CONNECTOR, step_s=0.01)) as decode,
    ):
        hand_off = await handed_off(prefill, prompt(100))
        attempt = place(
            decode, prompt(100), Stage.DECODE, hand_off=hand_off, max_tokens=10_000
        )  # fmt: skip
        decode.engine.cancel([attempt.id])
        assert await attempt.ended() == "cancelled"
        await decode.idle()
        await until(lambda: decode.engine.core.released)
        assert [name for name, *_ in decode.engine.core.seen] == ["add", "abort"]


async def test_a_held_decode_that_is_cancelled_lets_the_blocks_go() -> None:
    async with (
        running(engine(CONNECTOR)) as prefill,
        running(engine(CONNECTOR, step_s=0.001)) as decode,
    ):
        hand_off = await handed_off(prefill, prompt(100))
        running_one = place(decode, prompt(30), max_tokens=10_000)
        await running_one.until(lambda a: a.tokens)
        held = place(decode, prompt(100), Stage.DECODE, hand_off=hand_off, alone=True)
        await held.opened()
        decode.engine.cancel([held.id, running_one.id])
        assert await held.ended() == "cancelled"
        await until(lambda: decode.engine.core.released)
        await decode.idle()


async def test_a_refused_decode_lets_the_blocks_go() -> None:
    async with (
        running(engine(CONNECTOR)) as prefill,
        running(engine(CONNECTOR)) as decode,
    ):
        hand_off = await handed_off(prefill, prompt(100))
        too_hot = {"sampling": wire.ResolvedSampling(temperature=50)}
        attempt = place(decode, prompt(100), Stage.DECODE, hand_off=hand_off, **too_hot)
        assert await attempt.ended() == "refused"
        await until(lambda: decode.engine.core.released)
        await decode.idle()


async def test_hand_offs_that_cannot_be_are_refused() -> None:
    mesh = wire.HandOff(mesh=wire.MeshHandOff(transfer_id=b"x" * 16))
    other = wire.HandOff(engine=wire.EngineHandOff(connector="Other", payload=b"{}"))
    torn = wire.HandOff(engine=wire.EngineHandOff(connector=CONNECTOR, payload=b"{"))
    async with running(engine(CONNECTOR)) as driver:
        for hand_off, text in (
            (mesh, "on finish only"),
            (other, "'Other'"),
            (torn, "cannot be read"),
            (None, "not set"),
        ):
            attempt = place(driver, prompt(9), Stage.DECODE, hand_off=hand_off)
            assert await attempt.ended() == "refused"
            assert text in attempt.opening.refused.message
        await driver.idle()
    async with running(engine()) as driver:
        attempt = place(driver, prompt(9), Stage.PREFILL)
        assert await attempt.ended() == "refused"
        assert "no KV connector" in attempt.opening.refused.message


@pytest.mark.parametrize("stage", ["waiting", "prefill", "decoding", "aborted twice"])
async def test_a_cancel_in_every_stage_leaves_nothing(stage) -> None:
    # A prompt of more than a hundred steps: it is not done before it is cancelled.
    step_s = 0.1 if stage == "prefill" else 0.002
    async with running(engine(CONNECTOR, step_s=step_s, step_tokens=16)) as driver:
        if stage == "prefill":
            attempt = place(driver, prompt(3000), Stage.PREFILL)
            await until(lambda: driver.engine.core.running)
        else:
            attempt = place(driver, prompt(64), max_tokens=10_000)
        if stage in ("decoding", "aborted twice"):
            await attempt.until(lambda a: len(a.tokens) > 2)
        driver.engine.cancel([attempt.id])
        if stage == "aborted twice":
            driver.engine.cancel([attempt.id])
        assert await attempt.ended() == "cancelled"
        await driver.idle()
        assert driver.engine.core.running == {}


async def test_cancelling_what_is_not_there_is_ignored() -> None:
    async with running(engine()) as driver:
        driver.engine.cancel([AttemptId(b"x" * 16, 1, 1)])
        assert await place(driver, prompt(5)).ended() == "finished"
        assert [name for name, *_ in driver.engine.core.seen] == ["add"]


# -- ends ------------------------------------------------------------------------


async def test_a_core_that_dies_ends_the_engine() -> None:
    async with running(engine(step_s=0.001)) as driver:
        attempt = place(driver, prompt(30), max_tokens=10_000)
        await attempt.until(lambda a: a.tokens)
        driver.engine.core.broken = RuntimeError("the core is dead")
        async with asyncio.timeout(60):
            await driver.over.wait()
        assert driver.engine.core.stopped
        # What comes later is nobody's.
        driver.engine.cancel([attempt.id])


async def test_a_core_that_has_ended_before_its_start_is_told_at_once(monkeypatch) -> None:
    # What waits for a first request gives up at once, and says so.
    monkeypatch.setattr(warm_up, "_TIMEOUT_S", 0.0)
    built = engine()
    built.core.broken = RuntimeError("the core is dead")
    built._loop.post(lambda _: built.core.wake.set())
    await until(lambda: built._loop.over)
    with pytest.raises(SettingError, match="has ended"):
        VllmEngine.start(built, Nobody())
    await built.close()


async def test_closing_twice_is_closing_once() -> None:
    built = engine(step_s=0.001)
    async with running(built) as driver:
        await place(driver, prompt(7), max_tokens=10_000).until(lambda a: a.tokens)
    await built.close()
    assert built.core.stopped
