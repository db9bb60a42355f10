"""The torch engine with a tiny random model."""

import os
from pathlib import Path

from engine_harness import running, transfer_settings

from kvmesh.engine.core.engine import CoreEngine
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.engine.sim.vocabulary import tokenizer_files
from kvmesh.v1 import worker_pb2 as wire

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
"""Where it computes, as torch names it (`make test-cuda`)."""

MODEL = wire.StepModel(a_ms=1, b_ms=0.01, saturating_chunk=64)
SAMPLING = {"sampling": wire.ResolvedSampling(repetition_penalty=1, top_p=1)}


def write_model(folder: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(3)
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


def engine_of(
    folder,
    blocks=512,
    transfer=False,
    worker_id="w",
    incarnation=1,
    context_length=2048,
    **settings,
):
    from kvmesh.engine.torch import TorchSettings, build

    runner = build(TorchSettings(folder, device=DEVICE, dtype="float32", threads=1)).runner
    settings.setdefault("step_model", MODEL)
    return CoreEngine(
        runner,
        CoreSettings(
            pool_blocks=blocks, context_length=context_length, worker_id=worker_id,
            incarnation=incarnation, vocabulary_size=2000, **settings,
        ),
        wire.Capabilities(engine="torch", reproducible=True, max_logprobs=20),
        transfer_settings() if transfer else None,
    )  # fmt: skip


async def tokens_alone(folder, prompts, **continuation) -> list[list[int]]:
    """Tokens of requests that ran one after the other, and shared nothing."""
    outputs = []
    async with running(engine_of(folder)) as driver:
        for i, ids in enumerate(prompts):
            attempt = driver.place(ids, cache_salt=str(i), **SAMPLING, **continuation)
            assert await attempt.ended() == "finished"
            outputs.append(attempt.tokens)
    return outputs
