"""A step that raises ends those who were in it; a broken engine ends for all."""

import asyncio

import pytest
from engine_harness import VOCABULARY, Driver, prompt, running, sim
from tiny_torch import SAMPLING, engine_of, tokens_alone

from kvmesh.engine.sim.content import reference_tokens
from kvmesh.engine.sim.runner import SimRunner


class Breaker:
    """Makes chosen steps of every runner raise."""

    def __init__(self, monkeypatch) -> None:
        self.prompts = self.streams = False
        for name in ("forward", "forward_columns"):
            monkeypatch.setattr(SimRunner, name, self._wrapped(getattr(SimRunner, name)))
        decode = self._wrapped(lambda runner, _, rows: decode_columns(runner, rows))
        decode_columns = SimRunner.decode_columns
        monkeypatch.setattr(
            SimRunner, "decode_columns", lambda runner, rows: decode(runner, [], rows)
        )

    def _wrapped(self, whole):
        def step(runner, batch, *rows):
            if (self.prompts and batch) or (self.streams and rows):
                raise ArithmeticError("the step broke")
            return whole(runner, batch, *rows)

        return step


@pytest.fixture
def breaker(monkeypatch) -> Breaker:
    return Breaker(monkeypatch)


async def test_a_prompt_whose_step_raised_has_failed_and_the_next_is_served(breaker) -> None:
    async with running(sim()) as driver:
        breaker.prompts = True
        broken = [driver.place(prompt(100, seed)) for seed in range(3)]
        for attempt in broken:
            assert await attempt.ended() == "failed"
            assert attempt.end.failed.reason == "ENGINE_STEP_FAILED"
            assert attempt.end.failed.retryable
            # What broke stays in the worker's log: it may hold a prompt.
            assert attempt.end.failed.message == "ArithmeticError"
        breaker.prompts = False
        after = driver.place(prompt(100, 0))
        assert await after.ended() == "finished"
        assert after.tokens == reference_tokens(prompt(100, 0), 16, VOCABULARY)
        await driver.idle()


async def test_running_streams_whose_step_raised_have_failed(breaker) -> None:
    async with running(sim(profile="step-10ms", speed=5)) as driver:
        streams = [driver.place(prompt(50, seed), max_tokens=5_000) for seed in range(4)]
        for stream in streams:
            await stream.until(lambda a: len(a.tokens) >= 3)
        breaker.streams = True
        for stream in streams:
            assert await stream.ended() == "failed"
        breaker.streams = False
        assert await driver.place(prompt(50)).ended() == "finished"
        await driver.idle()


async def test_an_engine_thread_that_fails_says_so(monkeypatch) -> None:
    engine = sim()

    def broken(above) -> None:
        raise ArithmeticError("no plan")

    driver = Driver(engine)
    await asyncio.to_thread(engine.start, driver)
    monkeypatch.setattr(engine._loop.steps, "plan", broken)
    engine.cancel([(bytes(16), 1, 1)])
    async with asyncio.timeout(60):
        await driver.over.wait()
    assert driver.samples == driver.batches == []
    await engine.close()


@pytest.mark.parametrize("asks", ["python", "torch"])
async def test_streams_whose_step_found_no_memory_have_failed_and_go_on_with_their_tokens(
    folder, monkeypatch, asks
) -> None:
    """Memory that no machine has, asked for in the middle of a step of a real model."""
    import torch

    from kvmesh.engine.torch.runner import TorchRunner

    ask = {"python": bytearray, "torch": torch.empty}[asks]
    starved = False

    def layer(runner, index, hidden, kv) -> None:
        whole(runner, index, hidden, kv)
        if starved and index == 1:
            ask(1 << 60)

    ids = [prompt(50, seed) for seed in range(2)]
    expected = await tokens_alone(folder, ids, max_tokens=100)
    whole = TorchRunner._layer
    monkeypatch.setattr(TorchRunner, "_layer", layer)
    async with running(engine_of(folder)) as driver:
        asked = {"max_tokens": 100, **SAMPLING}
        driver.halt_when(lambda: all(len(stream.tokens) >= 20 for stream in streams))
        streams = [driver.place(one, **asked) for one in ids]
        await driver.halted()
        starved = True
        beside = driver.place(prompt(100, 9), **asked)
        driver.go_on()
        for attempt in (*streams, beside):
            assert await attempt.ended() == "failed"
            assert attempt.end.failed.reason == "ENGINE_STEP_FAILED"
            assert attempt.end.failed.retryable
            assert (
                attempt.end.failed.message
                == {"python": "MemoryError", "torch": "RuntimeError"}[asks]
            )
        starved = False
        for one, stream, tokens in zip(ids, streams, expected, strict=True):
            assert 20 <= len(stream.tokens) < 100
            rest = driver.place(one, output=stream.tokens, **asked)
            assert await rest.ended() == "finished"
            assert stream.tokens + rest.tokens == tokens
        await driver.idle()
