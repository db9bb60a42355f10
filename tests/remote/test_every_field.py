"""Nothing that a client asks for is lost on the way to a server: each field of a placement changes
what the server is asked, or is refused by its name."""

import asyncio
from contextlib import asynccontextmanager

import fake_first_party
import fake_smg
import pytest
from engine_harness import running
from fake_loop import do, there
from fake_model import END, FakeModel
from fake_openai import FakeOpenAi, serve
from google.protobuf import message as protobuf

from kvmesh.engine.remote.served import build
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import WorkerSettings

WIRES = ("smg", "first_party", "vllm", "sglang", "llamacpp")
PROMPT = [60, 70, 80]

SAMPLING = {
    "temperature": 0.5,
    "top_k": 40,
    "top_p": 0.75,
    "min_p": 0.25,
    "repetition_penalty": 1.25,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": [inference.LogitBias(token_id=7, bias=-100)],
    "seed": 12,
    "seed_given": True,
}
GRAMMARS = {
    "json_schema": '{"type": "string"}',
    "regex": "a+",
    "ebnf": "root ::= a",
    "json_object": True,
}
FIELDS = {
    "output_ids": [90],
    "max_tokens": 9,
    "min_tokens": 3,
    "stop_token_ids": [END, 33],
    "logprobs": 2,
    "cache_salt": "mine",
    "adapter": "poet",
}
SCHEDULED = {
    "model", "prompt_ids", "request_class", "virtual_deadline_ms", "deadline_ms", "waited_ms",
    "itl_target_ms",
}  # fmt: skip
"""Always there, or the mesh's own affair: when and where, not what."""

PATHS = {
    "min_tokens": "stopping.min_tokens",
    "logprobs": "output.logprobs",
    "cache_salt": "hints.cache_salt",
    "adapter": "model",
    "seed_given": "sampling.seed",
}
"""By which name of GenerateRequest a field is refused, where it is not its own."""

LACKS = {
    "smg": {"cache_salt", "adapter"},
    "first_party": set(),
    "vllm": {"adapter"},
    # It is one that does not draw by seeds.
    "sglang": {"adapter", "seed_given", "logprobs"},
    "llamacpp": {
        "adapter", "cache_salt", "min_tokens", "repetition_penalty", "frequency_penalty",
        "presence_penalty", "regex", "ebnf",
    },
}  # fmt: skip
"""What is refused, as docs/vllm.md says it."""

NOT_SENT = {
    # Without the mode in which it counts.
    ("sglang", "seed"),
    # Whoever reads the stream ends it there.
    ("llamacpp", "stop_token_ids"),
}


@asynccontextmanager
async def served(folder, kind):
    model = FakeModel()
    scheme, service = "vllm", None
    if kind == "smg":
        server, port = await there(fake_smg.serve(fake_smg.FakeSmg(model)))
    elif kind == "first_party":
        server, port, service = await there(fake_first_party.serve(model))
        service.sources = []
    else:
        scheme = "http"
        server, port = await there(serve(FakeOpenAi(model, kind)))
    try:
        given = {"server": f"{scheme}://127.0.0.1:{port}", "tokenizer": str(folder)}
        settings = WorkerSettings(engine="remote", engine_arguments=given)
        built = await asyncio.to_thread(build, settings, "w", 1, lambda line: None)
        async with running(built.engine) as driver:
            driver.model = model
            yield driver
    finally:
        if scheme == "http":
            do(server.close)
        else:
            await there(server.stop(None))


async def asked(driver, sampling=None, **fields):
    """What a server was asked, less names of the request; or the refusal."""
    driver.model.requests.clear()
    resolved = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, **(sampling or {})}
    fields = {"max_tokens": 5, "stop_token_ids": [END], **fields}
    output = fields.pop("output_ids", ())
    attempt = driver.place(
        PROMPT, output=output, sampling=wire.ResolvedSampling(**resolved), **fields
    )
    if await attempt.ended() == "refused":
        assert driver.model.requests == []
        return attempt.opening.refused
    (said,) = driver.model.requests
    if isinstance(said, protobuf.Message):
        plain = type(said)()
        plain.CopyFrom(said)
        plain.ClearField("request_id")
        return plain
    return {key: value for key, value in said.items() if key not in ("request_id", "rid")}


def test_each_field_of_the_wire_is_looked_at_here() -> None:
    fields = {field.name for field in wire.Continuation.DESCRIPTOR.fields}
    assert fields == SCHEDULED | set(FIELDS) | {"sampling", "grammar"}
    assert {field.name for field in wire.ResolvedSampling.DESCRIPTOR.fields} == set(SAMPLING)
    kinds = inference.Grammar.DESCRIPTOR.oneofs_by_name["kind"].fields
    assert {field.name for field in kinds} == set(GRAMMARS)


@pytest.mark.parametrize("kind", WIRES)
async def test_a_field_is_sent_or_refused_by_name(folder, kind) -> None:
    changes = {name: {"sampling": {name: value}} for name, value in SAMPLING.items()}
    # Nobody gives one without a number, and a number that nobody gave is not kept to.
    changes["seed_given"] = {"sampling": {"seed": 12, "seed_given": True}}
    grammars = {name: inference.Grammar(**{name: value}) for name, value in GRAMMARS.items()}
    changes |= {name: {"grammar": grammar} for name, grammar in grammars.items()}
    changes |= {name: {name: value} for name, value in FIELDS.items()}
    async with served(folder, kind) as driver:
        plain = await asked(driver)
        assert await asked(driver) == plain
        lacking = {}
        for name, change in changes.items():
            said = await asked(driver, **change)
            if isinstance(said, wire.Refused):
                lacking[name] = said.field
            else:
                assert (said != plain) == ((kind, name) not in NOT_SENT), name
        own = {name: f"sampling.{name}" for name in SAMPLING} | dict.fromkeys(GRAMMARS, "grammar")
        assert lacking == {name: (own | PATHS)[name] for name in LACKS[kind]}
