"""The torch runner behind the same core: the contract with a tiny random model."""

import pytest
from engine_harness import mesh_from, prompt, running

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvmesh.engine.contract import Stage  # noqa: E402
from kvmesh.engine.core.engine import CoreEngine, TransferSettings  # noqa: E402
from kvmesh.engine.core.settings import CoreSettings  # noqa: E402
from kvmesh.engine.sim.vocabulary import tokenizer_files  # noqa: E402
from kvmesh.engine.torch import (  # noqa: E402
    TorchSettings,
    build,
    served,
)
from kvmesh.v1 import worker_pb2 as wire  # noqa: E402
from kvmesh.worker.settings import SettingError, WorkerSettings  # noqa: E402

MODEL = wire.StepModel(a_ms=1, b_ms=0.01, saturating_chunk=64)
SAMPLING = {"sampling": wire.ResolvedSampling(repetition_penalty=1, top_p=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    for name, content in tokenizer_files(2000).items():
        (folder / name).write_bytes(content)
    return str(folder)


def engine_of(folder, blocks=512, transfer=False, worker_id="w", incarnation=1, **settings):
    runner = build(TorchSettings(folder, dtype="float32", threads=1)).runner
    settings.setdefault("step_model", MODEL)
    return CoreEngine(
        runner,
        CoreSettings(
            pool_blocks=blocks, context_length=2048, worker_id=worker_id,
            incarnation=incarnation, **settings,
        ),
        wire.Capabilities(engine="torch", reproducible=True, max_logprobs=20),
        TransferSettings() if transfer else None,
    )  # fmt: skip


@pytest.fixture
async def alone(folder):
    """Tokens of requests that ran one after the other."""

    async def run(prompts, **continuation):
        outputs = []
        async with running(engine_of(folder)) as driver:
            for i, ids in enumerate(prompts):
                attempt = driver.place(ids, cache_salt=str(i), **SAMPLING, **continuation)
                assert await attempt.ended() == "finished"
                outputs.append(attempt.tokens)
        return outputs

    return run


async def test_batches_and_prefixes_change_nothing(folder, alone) -> None:
    prompts = [prompt(10 + 60 * i, seed=i % 3) for i in range(6)]
    expected = await alone(prompts, max_tokens=24)
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
async def test_a_hand_off_gives_the_tokens_of_one_engine(folder, alone, length) -> None:
    expected = await alone([prompt(length)], max_tokens=24)
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
async def test_a_fixed_chunk_bounds_the_prompts_of_a_step(folder, alone, chunk) -> None:
    prompts = [prompt(length, length) for length in (40, 300, 150)]
    expected = await alone(prompts, max_tokens=8)
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
