"""What every engine promises (engine/contract.py), and what kvmesh's own add."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_torch
from engine_harness import VOCABULARY, Driver, apply, chains_of, mesh_from, prompt, running, sim

from kvmesh.engine.contract import STORED, AttemptId, Stage
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

SIMULATED = ("kvmesh", "vllm")


@dataclass
class Kind:
    """One kind of engine, and what it says to a prompt."""

    name: str
    folder: str = ""
    said: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        return self.name in SIMULATED

    def engine(self, blocks: int = 512, pace: str = "", **settings: Any) -> Any:
        """`pace` is a profile of the simulated one; the other is as slow as it is."""
        if not self.simulated:
            settings.pop("speed", None)
            return tiny_torch.engine_of(self.folder, blocks=blocks, **settings)
        if pace:
            settings["profile"] = pace
        return sim(self.name, blocks=blocks, **settings)

    def place(self, driver: Driver, ids: Sequence[int], *args: Any, **more: Any) -> Any:
        """The most likely token each time."""
        if not self.simulated:
            more = {**tiny_torch.SAMPLING, **more}
        return driver.place(ids, *args, **more)

    async def tokens(self, ids: Sequence[int], count: int) -> list[int]:
        """What an engine says that does nothing else."""
        if self.simulated:
            return reference_tokens(ids, count, VOCABULARY)
        known = self.said.get(tuple(ids), [])
        if len(known) < count:
            (known,) = await tiny_torch.tokens_alone(self.folder, [ids], max_tokens=count)
            self.said[tuple(ids)] = known
        return known[:count]


@pytest.fixture(params=SIMULATED)
def like(request) -> str:
    return request.param


_torch = Kind("torch")


@pytest.fixture(params=(*SIMULATED, "torch"))
def kind(request) -> Kind:
    if request.param in SIMULATED:
        return Kind(request.param)
    _torch.folder = request.getfixturevalue("folder")
    return _torch


async def test_a_whole_request_gives_every_token_once(kind) -> None:
    async with running(kind.engine()) as driver:
        attempt = kind.place(driver, prompt(100), max_tokens=40)
        assert await attempt.ended() == "finished"
        assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH
        assert attempt.tokens == await kind.tokens(prompt(100), 40)
        await driver.idle()


async def test_batched_requests_are_as_if_alone(kind) -> None:
    async with running(kind.engine(blocks=2048)) as driver:
        prompts = [prompt(3 + 37 * i, seed=i) for i in range(20)]
        attempts = [kind.place(driver, p, max_tokens=5 + 3 * i) for i, p in enumerate(prompts)]
        for i, attempt in enumerate(attempts):
            assert await attempt.ended() == "finished"
            assert attempt.tokens == await kind.tokens(prompts[i], 5 + 3 * i)
        await driver.idle()


async def test_a_continuation_goes_on_where_it_was(kind) -> None:
    whole = await kind.tokens(prompt(50), 30)
    async with running(kind.engine()) as driver:
        attempt = kind.place(driver, prompt(50), output=whole[:11], max_tokens=30)
        await attempt.ended()
        assert attempt.tokens == whole[11:]


async def test_a_cached_prefix_is_used_and_changes_nothing(kind) -> None:
    async with running(kind.engine()) as driver:
        await kind.place(driver, prompt(100)).ended()
        again = kind.place(driver, prompt(100))
        await again.ended()
        assert again.opening.reserved.tokens_held == 96
        assert again.end.timings.cached_tokens == 96
        assert again.end.timings.computed_tokens == 4
        assert again.tokens == await kind.tokens(prompt(100), 16)


async def test_another_salt_shares_nothing(kind) -> None:
    async with running(kind.engine()) as driver:
        await kind.place(driver, prompt(64), cache_salt="a").ended()
        other = kind.place(driver, prompt(64), cache_salt="b")
        await other.ended()
        assert other.end.timings.cached_tokens == 0


async def test_a_corrupted_block_gives_wrong_tokens(like) -> None:
    """So that tests which compare tokens can fail."""
    import numpy as np

    engine = sim(like)
    async with running(engine) as driver:
        await driver.place(prompt(100)).ended()
        await driver.idle()
        memory = np.frombuffer(engine._memory, np.uint8)
        cached = [s for s in range(engine._pool.blocks) if engine._pool.parent[s] != -1]
        memory[cached[0] * 1024 + 777] ^= 1
        del memory
        again = driver.place(prompt(100))
        await again.ended()
        assert again.end.timings.cached_tokens == 96
        assert again.tokens != reference_tokens(prompt(100), 16, VOCABULARY)


async def test_a_stop_id_ends_the_output(kind) -> None:
    expected = await kind.tokens(prompt(20), 16)
    async with running(kind.engine()) as driver:
        attempt = kind.place(driver, prompt(20), stop_token_ids=[expected[6]], max_tokens=16)
        await attempt.ended()
        assert attempt.tokens == expected[: expected.index(expected[6]) + 1]
        assert attempt.end.finished.reason == inference.FINISH_REASON_STOP
        assert attempt.end.finished.stop_token_id == expected[6]


async def test_ends_of_text_wait_for_min_tokens(like) -> None:
    async with running(sim(like, end_of_text=3)) as driver:
        attempts = [
            driver.place(prompt(20, i), stop_token_ids=[0, 2], min_tokens=20, max_tokens=200)
            for i in range(8)
        ]
        for attempt in attempts:
            await attempt.ended()
            assert len(attempt.tokens) >= 20
            assert not {0, 2} & set(attempt.tokens[:-1])
            assert attempt.end.finished.reason == inference.FINISH_REASON_STOP


async def test_the_context_ends_the_output(kind) -> None:
    async with running(kind.engine(context_length=64)) as driver:
        attempt = kind.place(driver, prompt(50), max_tokens=100)
        await attempt.ended()
        assert len(attempt.tokens) == 14
        assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH


@pytest.mark.parametrize("length", [33 * 16, 600])
async def test_what_can_never_fit_is_refused(kind, length) -> None:
    async with running(kind.engine(blocks=33)) as driver:
        attempt = kind.place(driver, prompt(length))
        assert await attempt.ended() == "refused"
        assert attempt.opening.refused.reason == wire.REFUSAL_REASON_UNSUPPORTED
        assert "528" in attempt.opening.refused.message
        await driver.idle()


async def test_an_attempt_can_be_told_apart_by_its_tokens(like) -> None:
    async with running(sim(like, attempt_tokens=True)) as driver:
        first = driver.place(prompt(30), id=AttemptId(b"a" * 16, 1, 1))
        second = driver.place(prompt(30), id=AttemptId(b"a" * 16, 1, 2))
        await first.ended()
        await second.ended()
        assert first.tokens == reference_tokens(prompt(30), 16, VOCABULARY, tag=1 << 32 | 1)
        assert second.tokens == reference_tokens(prompt(30), 16, VOCABULARY, tag=1 << 32 | 2)


async def test_cancel_ends_a_queued_and_a_running_request(kind) -> None:
    async with running(kind.engine(blocks=100, pace="step-10ms", speed=10)) as driver:
        running_one = kind.place(driver, prompt(40), max_tokens=5000)
        driver.halt_when(lambda: len(running_one.tokens) > 3)
        await driver.halted()
        waiting = kind.place(driver, prompt(1500), max_tokens=2)
        driver.halt_when(lambda: waiting.opening is not None)
        await driver.halted()
        driver.engine.cancel([running_one.id, waiting.id])
        driver.go_on()
        assert await running_one.ended() == "cancelled"
        assert await waiting.ended() == "cancelled"
        await driver.idle()


async def test_cancelling_what_is_not_there_is_ignored(kind) -> None:
    async with running(kind.engine()) as driver:
        driver.engine.cancel([AttemptId(b"x" * 16, 1, 1)])
        assert await kind.place(driver, prompt(5)).ended() == "finished"


async def test_a_full_pool_returns_streams_and_finishes_the_others(kind) -> None:
    """Streams that are returned are placed anew by their router, as here."""
    async with running(kind.engine(blocks=40)) as driver:
        work = [(prompt(100, i), [], i) for i in range(8)]
        done = {}
        returned = 0
        while work:
            # They come together.
            driver.halt_when(lambda: True)
            placed = [
                (p, out, i, kind.place(driver, p, output=out, max_tokens=150)) for p, out, i in work
            ]
            driver.go_on()
            work = []
            for p, out, i, attempt in placed:
                end = await attempt.ended()
                out = out + attempt.tokens
                if end == "returned":
                    returned += 1
                    work.append((p, out, i))
                else:
                    assert end == "finished"
                    done[i] = out
        assert returned
        for i, out in done.items():
            assert out == await kind.tokens(prompt(100, i), 150)
        await driver.idle()


async def test_the_lowest_class_gives_way(kind) -> None:
    async with running(kind.engine(blocks=30)) as driver:
        driver.halt_when(lambda: True)
        fast = [
            kind.place(
                driver,
                prompt(60, i),
                max_tokens=200,
                request_class=inference.REQUEST_CLASS_INTERACTIVE,
            )
            for i in range(1)
        ]
        slow = kind.place(
            driver, prompt(60, 9), max_tokens=200, request_class=inference.REQUEST_CLASS_BATCH
        )
        driver.go_on()
        assert await slow.ended() == "returned"
        assert await fast[0].ended() == "finished"


async def test_an_urgent_prompt_does_not_wait_for_a_long_one(like, tmp_path) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    settings = {"profile": "cpu-135m", "speed": 200, "slow_while": str(slow)}
    async with running(sim(like, blocks=2000, **settings)) as driver:
        long = driver.place(prompt(20_000), deadline_ms=1e9, max_tokens=1)
        await asyncio.to_thread(_until_busy, driver.engine)
        urgent = driver.place(prompt(30), deadline_ms=0, max_tokens=1)
        await urgent.ended()
        assert long.end is None
        assert long.tokens == []
        slow.unlink()
        await long.ended()
        assert long.tokens == reference_tokens(prompt(20_000), 1, VOCABULARY)


def _until_busy(engine) -> None:
    while not engine.load().step_age_ms:
        pass


async def test_streams_go_on_beside_a_long_prompt(like) -> None:
    async with running(sim(like, blocks=2000, profile="cpu-135m", speed=200)) as driver:
        stream = driver.place(prompt(30), max_tokens=4000, itl_target_ms=1)
        driver.halt_when(lambda: len(stream.tokens) > 2)
        await driver.halted()
        long = driver.place(prompt(8_000, 5), max_tokens=1)
        driver.go_on()
        await long.ended()
        assert len(stream.tokens) > 5
        mixed = [s for s in driver.samples if s.prefill_tokens and s.decode_batch]
        assert mixed, "no step held both"
        driver.engine.cancel([stream.id])
        await stream.ended()


async def test_a_suspect_shares_its_steps_with_nobody(kind) -> None:
    async with running(kind.engine()) as driver:
        others = [kind.place(driver, prompt(30, i), max_tokens=300) for i in range(4)]
        suspect = kind.place(driver, prompt(40, 9), alone=True, max_tokens=20)
        await suspect.ended()
        assert suspect.tokens == await kind.tokens(prompt(40, 9), 20)
        for other in others:
            await other.ended()
        lonely = [s for s in driver.samples if (s.prefill_tokens > 0) + s.decode_batch == 1]
        assert len(lonely) >= 20


async def test_samples_tell_what_steps_held(kind) -> None:
    async with running(kind.engine()) as driver:
        attempt = kind.place(driver, prompt(100), max_tokens=10)
        await attempt.ended()
        assert sum(s.prefill_tokens for s in driver.samples) == 100
        assert sum(s.prefill_context for s in driver.samples) == sum(range(1, 101))
        assert sum(s.decode_batch for s in driver.samples) == 9
        assert sum(s.decode_context for s in driver.samples) == sum(range(101, 110))


async def test_events_and_snapshot_tell_the_same_cache(kind) -> None:
    engine = kind.engine(blocks=30)
    async with running(engine) as driver:
        for i in range(9):
            await kind.place(driver, prompt(100, i)).ended()
        await driver.idle()
        parts = list(engine.snapshot())
    told: set[int] = set()
    for batch in driver.batches:
        apply(told, batch)
    assert {change.kind for part in parts for change in part} == {STORED}
    chains = chains_of(parts)
    assert set(chains) == told
    assert len(chains) == len(told) == engine.load().kv.evictable


async def test_load_counts_what_runs(kind) -> None:
    async with running(kind.engine(pace="step-10ms", speed=5)) as driver:
        attempt = kind.place(driver, prompt(100), max_tokens=1000)
        driver.halt_when(lambda: len(attempt.tokens) >= 5)
        await driver.halted()
        share = driver.engine.load().shares["router"]
        assert share.decoding == 1
        assert 104 <= share.decode_context <= 1100
        driver.engine.cancel([attempt.id])
        driver.go_on()
        await attempt.ended()
        await driver.idle()
        assert "router" not in driver.engine.load().shares


async def test_unsupported_features_are_refused(like) -> None:
    # Slow enough that no prompt is done before it is cancelled.
    slow = {"profile": "step-10ms", "speed": 0.02}
    async with running(sim(like, blocks=400, transfer=True, **slow)) as driver:
        grammar = driver.place(prompt(9), grammar=wire.Continuation().grammar.__class__())
        assert await grammar.ended() == "refused"
        assert grammar.opening.refused.field == "grammar"
        no_hand_off = driver.place(prompt(9), Stage.DECODE)
        assert await no_hand_off.ended() == "refused"
        foreign = driver.place(prompt(6000), Stage.PREFILL, hand_off=mesh_from(driver.engine))
        if like == "vllm":
            assert await foreign.ended() == "refused"
        else:
            assert not (await foreign.opened()).HasField("refused")
            driver.engine.cancel([foreign.id])
        await driver.idle()


async def test_closing_ends_everything(kind) -> None:
    engine = kind.engine(pace="step-10ms")
    async with running(engine) as driver:
        for i in range(5):
            kind.place(driver, prompt(100, i), max_tokens=10_000)
        await kind.place(driver, prompt(7), max_tokens=2).opened()
    await engine.close()


async def test_token_ids_outside_the_vocabulary_are_refused(kind) -> None:
    async with running(kind.engine()) as driver:
        attempt = kind.place(driver, [5, 2000, 7])
        assert await attempt.ended() == "refused"
        assert "2000" in attempt.opening.refused.message
        await driver.idle()


async def test_streams_that_grow_take_no_room_from_a_prompt_within_its_step(kind) -> None:
    # Prompts are computed beside streams that fill the pool: who gives way is
    # given back, and nobody's chunk is counted in blocks that went to others.
    async with running(kind.engine(blocks=120)) as driver:
        driver.halt_when(lambda: True)
        attempts = [kind.place(driver, prompt(64 + i, i), max_tokens=300) for i in range(60)]
        driver.go_on()
        ends = [await attempt.ended() for attempt in attempts]
        assert set(ends) <= {"finished", "returned"}
        assert "returned" in ends
        for attempt, end in zip(attempts, ends, strict=True):
            if end == "finished":
                expected = prompt(64 + attempts.index(attempt), attempts.index(attempt))
                assert attempt.tokens == await kind.tokens(expected, 300)
        await driver.idle()
