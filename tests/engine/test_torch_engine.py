"""What the torch engine has beyond the contract, with a tiny random model."""

import pytest
from engine_harness import mesh_from, prompt, running
from tiny_torch import SAMPLING, engine_of, tokens_alone

torch = pytest.importorskip("torch")

from kvmesh.engine.contract import Stage  # noqa: E402
from kvmesh.engine.torch import served  # noqa: E402
from kvmesh.worker.settings import SettingError, WorkerSettings  # noqa: E402


async def test_batches_and_prefixes_change_nothing(folder) -> None:
    prompts = [prompt(10 + 60 * i, seed=i % 3) for i in range(6)]
    expected = await tokens_alone(folder, prompts, max_tokens=24)
    async with running(engine_of(folder)) as driver:
        attempts = [driver.place(ids, **SAMPLING, max_tokens=24) for ids in prompts]
        for attempt, tokens in zip(attempts, expected, strict=True):
            assert await attempt.ended() == "finished"
            assert attempt.tokens == tokens
        again = driver.place(prompts[5], **SAMPLING, max_tokens=24)
        await again.ended()
        assert again.end.timings.cached_tokens >= 288
        assert again.tokens == expected[5]
        await driver.idle()


@pytest.mark.parametrize("length", [5, 16, 200])
async def test_a_hand_off_gives_the_tokens_of_one_engine(folder, length) -> None:
    expected = await tokens_alone(folder, [prompt(length)], max_tokens=24)
    sender = engine_of(folder, transfer=True, worker_id="p", incarnation=3)
    receiver = engine_of(folder, transfer=True, worker_id="d", incarnation=4)
    async with running(sender) as p, running(receiver) as d:
        hand_off = mesh_from(sender, "p", 3)
        decode = d.place(prompt(length), Stage.DECODE, hand_off=hand_off, **SAMPLING, max_tokens=24)
        await decode.opened()
        prefill = p.place(
            prompt(length),
            Stage.PREFILL,
            id=decode.id,
            hand_off=hand_off,
            **SAMPLING,
            max_tokens=24,
        )
        assert await prefill.ended() == "handed_off"
        assert await decode.ended() == "finished"
        assert decode.tokens == expected[0]
        assert prefill.tokens == expected[0][:1]
        await p.idle()
        await d.idle()


@pytest.mark.parametrize("chunk", [16, 64, 256])
async def test_a_fixed_chunk_bounds_the_prompts_of_a_step(folder, chunk) -> None:
    prompts = [prompt(length, length) for length in (40, 300, 150)]
    expected = await tokens_alone(folder, prompts, max_tokens=8)
    async with running(engine_of(folder, chunk_tokens=chunk)) as driver:
        attempts = [driver.place(ids, **SAMPLING, max_tokens=8) for ids in prompts]
        for attempt, tokens in zip(attempts, expected, strict=True):
            assert await attempt.ended() == "finished"
            assert attempt.tokens == tokens
        # Chunks end where blocks do.
        assert chunk - 16 < max(sample.prefill_tokens for sample in driver.samples) <= chunk
        assert sum(sample.prefill_tokens for sample in driver.samples) == 490


@pytest.mark.parametrize("tokens", ["-16", "40"])
def test_a_chunk_that_ends_within_a_block_is_refused(folder, tokens) -> None:
    settings = WorkerSettings(model=folder, engine_arguments={"chunk_tokens": tokens})
    with pytest.raises(SettingError, match="chunk_tokens is"):
        served.build(settings, "w", 1, lambda _: None)


async def test_log_probabilities_come_with_their_rows(folder) -> None:
    async with running(engine_of(folder)) as driver:
        plain = [driver.place(prompt(30, i), **SAMPLING, max_tokens=8) for i in range(3)]
        asked = driver.place(prompt(30, 9), **SAMPLING, max_tokens=8, logprobs=2)
        for attempt in (*plain, asked):
            assert await attempt.ended() == "finished"
        assert len(asked.logprobs) == 8
        for entry, token in zip(asked.logprobs, asked.tokens, strict=True):
            assert entry.top_ids[0] == token
            assert entry.logprob == pytest.approx(entry.top_logprobs[0])
        assert all(not attempt.logprobs for attempt in plain)


async def test_warm_up_predicts_the_steps_that_follow(folder) -> None:
    engine = engine_of(folder, step_model=None)
    async with running(engine) as driver:
        model = engine.step_model()
        assert min(model.a_ms, model.b_ms, model.c_ms, model.d_ms, model.e_ms) >= 0
        assert model.a_ms + model.b_ms + model.d_ms > 0
        assert model.saturating_chunk >= 128
        assert await driver.place(prompt(30), **SAMPLING).ended() == "finished"
        await driver.idle()
