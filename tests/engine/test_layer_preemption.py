"""A prompt is held between two layers: by a more urgent one, and by streams whose token is due.

A step with streams is not held: what it computes of prompts is short.
"""

from itertools import pairwise

import pytest
from engine_harness import VOCABULARY, Driver, StepClock, prompt, running, sim

from kvmesh.engine.contract import AttemptId
from kvmesh.engine.core.step_model import StepLoad, predict_ms
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.engine.sim.settings import PROFILES

LONG = 600
"""Tokens of the prompt that is held: one chunk where nobody decodes."""
TARGET_MS = 100.0
"""Preemption target (SCHEDULING 4)."""


def slow(clock, like="kvmesh", blocks=2_000):
    """30 layers, an even chunk of 128 tokens, 45 ms for a step of nothing."""
    return sim(like, blocks=blocks, profile="cpu-135m", speed=1, clock=clock)


async def test_a_more_urgent_prompt_runs_between_two_layers() -> None:
    clock, urgent = StepClock(), []
    engine = slow(clock)
    async with running(engine) as driver:
        # At the end of a layer, while the engine's thread has the long prompt's step.
        clock.passes.append(
            lambda: urgent.append(
                driver.place(prompt(30), deadline_ms=0, max_tokens=1, received_at=clock.time)
            )
        )
        long = driver.place(prompt(LONG, 3), deadline_ms=1e9, max_tokens=1, trace=True)
        await long.ended()
        assert await urgent[0].ended() == "finished"
        # The first step that ended is the urgent one's, though the other began before it.
        assert driver.samples[0].prefill_tokens == 30
        layer_ms = driver.samples[1].duration_us / 1e3 / 30
        assert urgent[0].end.timings.HasField("urgent_start_ms")
        assert urgent[0].end.timings.urgent_start_ms <= layer_ms
        pauses = [span for span in long.end.timings.trace if span.name == "pause"]
        chunks = [span for span in long.end.timings.trace if span.name == "prefill_chunk"]
        assert [span.cause for span in pauses] == ["more urgent work between two layers"]
        # The pause lies within the chunk, which counts it, and the step's own time does not.
        urgent_ms, own_ms = (sample.duration_us / 1e3 for sample in driver.samples[:2])
        assert pauses[0].duration_ms == pytest.approx(urgent_ms, abs=0.01)
        assert chunks[0].duration_ms == pytest.approx(own_ms + urgent_ms, abs=0.01)
        assert long.tokens == reference_tokens(prompt(LONG, 3), 1, VOCABULARY)


async def test_without_pauses_it_waits_for_the_chunk() -> None:
    clock, urgent = StepClock(), []
    async with running(slow(clock, "vllm")) as driver:
        clock.passes.append(
            lambda: urgent.append(driver.place(prompt(30), deadline_ms=0, max_tokens=1))
        )
        long = driver.place(prompt(LONG, 3), deadline_ms=1e9, max_tokens=1, trace=True)
        await long.ended()
        assert await urgent[0].ended() == "finished"
        assert driver.samples[0].prefill_tokens != 30
        assert not [span for span in long.end.timings.trace if span.name == "pause"]


class DecodeTimes(Driver):
    """Keeps when steps with decoding streams ended."""

    def __init__(self, engine, clock) -> None:
        super().__init__(engine)
        self.times: list[float] = []
        self._clock = clock

    def step(self, output) -> None:
        if output.sample is not None and output.sample.decode_batch:
            self.times.append(self._clock.time)
        super().step(output)


async def test_streams_have_their_tokens_within_their_target_while_a_prompt_is_held() -> None:
    """A stream that begins inside a long prompt's step decodes between its layers."""
    clock, stream = StepClock(), []
    target_ms = 120.0
    engine = slow(clock)
    driver = DecodeTimes(engine, clock)
    engine.start(driver)
    try:
        clock.passes.append(
            lambda: stream.append(
                driver.place(prompt(30), deadline_ms=0, max_tokens=6, itl_target_ms=target_ms)
            )
        )
        long = driver.place(prompt(LONG, 3), deadline_ms=1e9, max_tokens=1)
        await long.ended()
        assert await stream[0].ended() == "finished"
    finally:
        await engine.close()
    assert stream[0].tokens == reference_tokens(prompt(30), 6, VOCABULARY)
    held = next(n for n, one in enumerate(driver.samples) if one.prefill_tokens > 30)
    decoded = [one for one in driver.samples[:held] if one.decode_batch]
    assert len(decoded) == len(driver.times) == 5, "a token came only after the held chunk"
    gaps_ms = [1e3 * (after - before) for before, after in pairwise(driver.times)]
    step_ms = decoded[0].duration_us / 1e3
    # Layers ran between them, as many as the target leaves time for.
    assert all(1.2 * step_ms < gap_ms <= target_ms for gap_ms in gaps_ms), gaps_ms


def decode_ms(sample) -> float:
    """What a step of the streams of this one takes without its prompts."""
    load = StepLoad(decode_batch=sample.decode_batch, decode_context=sample.decode_context)
    return predict_ms(PROFILES["cpu-135m"].model, load)


@pytest.mark.parametrize("itl_target_ms", [0.0, 60_000.0])
async def test_an_urgent_prompt_waits_for_the_preemption_target_in_a_step_with_patient_streams(
    itl_target_ms,
) -> None:
    """A stream without a target, or with one that is no bound, beside a document."""
    clock, placed = StepClock(), []
    engine = slow(clock)
    queue, batch = engine._loop.queue, engine._loop.streams.batch
    async with running(engine) as driver:

        def document_comes() -> None:
            placed.append(driver.place(prompt(LONG, 3), deadline_ms=1e9, max_tokens=1))
            clock.passes.append(urgent_comes)

        def urgent_comes() -> None:
            if queue.in_step and len(batch):
                placed.append(
                    driver.place(prompt(30, 5), deadline_ms=0, max_tokens=1, received_at=clock.time)
                )
            else:
                clock.passes.append(urgent_comes)

        # While the stream's own prompt is computed, so that it decodes beside all of both.
        clock.passes.append(document_comes)
        stream = driver.place(
            prompt(30), deadline_ms=0, max_tokens=100, itl_target_ms=itl_target_ms
        )
        assert await stream.ended() == "finished"
        document, urgent = placed
        assert await document.ended() == await urgent.ended() == "finished"
        mixed = [one for one in driver.samples if one.prefill_tokens and one.decode_batch]
        # All of both prompts: none of it was computed without the stream.
        assert sum(one.prefill_tokens for one in mixed) == LONG + 30
        for one in mixed:
            assert one.duration_us / 1e3 <= TARGET_MS + decode_ms(one)
        # It came in the first of them, at the end of the first layer.
        first_ms = mixed[0].duration_us / 1e3
        assert urgent.end.timings.urgent_start_ms == pytest.approx(first_ms * 29 / 30, abs=0.01)
        assert urgent.tokens == reference_tokens(prompt(30, 5), 1, VOCABULARY)


async def test_streams_do_not_decode_before_their_time_for_a_prompt_without_room() -> None:
    clock, placed = StepClock(), []
    # The long prompt's 38 and the stream's 5: the urgent one's 19 are not there.
    engine = slow(clock, blocks=50)
    batch = engine._loop.streams.batch
    async with running(engine) as driver:

        def stream_comes() -> None:
            # No target: once its second token is made no other is due.
            placed.append(driver.place(prompt(30), deadline_ms=0, max_tokens=40))
            clock.passes.append(urgent_comes)

        def urgent_comes() -> None:
            if len(batch):
                placed.append(driver.place(prompt(300, 5), deadline_ms=0, max_tokens=1))
            else:
                clock.passes.append(urgent_comes)

        clock.passes.append(stream_comes)
        long = driver.place(prompt(LONG, 3), deadline_ms=1e9, max_tokens=1)
        assert await long.ended() == "finished"
        stream, urgent = placed
        assert await stream.ended() == await urgent.ended() == "finished"
    held = next(n for n, one in enumerate(driver.samples) if one.prefill_tokens > 30)
    # The stream's prompt, its second token, and the chunk that was held for them.
    assert [(one.prefill_tokens, one.decode_batch) for one in driver.samples[: held + 1]] == [
        (30, 0),
        (0, 1),
        (128, 0),
    ]
    # Then the long prompt gave its room up, and was computed last.
    assert urgent.tokens == reference_tokens(prompt(300, 5), 1, VOCABULARY)
    assert long.tokens == reference_tokens(prompt(LONG, 3), 1, VOCABULARY)


@pytest.mark.parametrize("like", ["kvmesh", "vllm"])
async def test_a_cancelled_prompt_has_no_layer_more(like) -> None:
    clock, stopped, id = StepClock(), [], AttemptId(b"c" * 16, 1, 1)
    async with running(slow(clock, like)) as driver:

        def cancel() -> None:
            driver.engine.cancel([id])
            stopped.append(clock.time)

        # At the end of the tenth layer of thirty.
        clock.passes += [cancel, *[lambda: None] * 9]
        begun = clock.time
        long = driver.place(prompt(LONG, 3), id=id, max_tokens=1)
        assert await long.ended() == "cancelled"
        await driver.idle()
        assert stopped[0] > begun
        assert [clock.time] == stopped
        # Nor does the chunk count: none of its tokens was computed to the last layer.
        assert driver.samples == []
        assert long.end.timings.computed_tokens == 0
