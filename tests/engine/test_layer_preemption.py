"""A prompt is held between two layers: by a more urgent one, and by streams whose token is due."""

from itertools import pairwise

import pytest
from engine_harness import VOCABULARY, Driver, StepClock, prompt, running, sim

from kvmesh.engine.sim.content import reference_tokens

LONG = 600
"""Tokens of the prompt that is held: one chunk where nobody decodes."""


def slow(clock, like="kvmesh"):
    """30 layers, an even chunk of 128 tokens, 45 ms for a step of nothing."""
    return sim(like, blocks=2_000, profile="cpu-135m", speed=1, clock=clock)


async def test_a_more_urgent_prompt_runs_between_two_layers() -> None:
    clock, urgent = StepClock(), []
    engine = slow(clock)
    async with running(engine) as driver:
        # At the end of a layer, while the engine's thread has the long prompt's step.
        clock.passes.append(
            lambda: urgent.append(driver.place(prompt(30), deadline_ms=0, max_tokens=1))
        )
        long = driver.place(prompt(LONG, 3), deadline_ms=1e9, max_tokens=1, trace=True)
        await long.ended()
        assert await urgent[0].ended() == "finished"
        # The first step that ended is the urgent one's, though the other began before it.
        assert driver.samples[0].prefill_tokens == 30
        layer_ms = driver.samples[1].duration_us / 1e3 / 30
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
