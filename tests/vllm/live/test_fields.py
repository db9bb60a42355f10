"""The fields of vLLM's own requests, and of SMG's servicer, are those that we know: one that a new
version has is taken or refused before it can be lost."""

import re
from pathlib import Path

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

ROOT = Path(__file__).resolve().parents[3]


def test_no_field_of_vllms_http_is_unknown() -> None:
    listed = (ROOT / "tests/structure/test_openai_fields.py").read_text()
    known = re.search(r'VLLM = """(.*?)"""', listed, re.DOTALL)
    assert known is not None
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
    assert fields == set(known[1].split())


@pytest.mark.parametrize("name", ["GenerateRequest", "SamplingParams", "TokenizedInput"])
def test_no_field_of_the_servicers_is_unknown(name) -> None:
    # Both in one process would be two messages of one name.
    proto = (ROOT / "proto/vllm/engine.proto").read_text()
    message = re.search(rf"^message {name} {{\n(.*?)^}}", proto, re.DOTALL | re.MULTILINE)
    assert message is not None
    ours = re.findall(r"^ +[\w ,.<>]*?(\w+) = (\d+);", message[1], re.MULTILINE)
    theirs = getattr(vllm_engine_pb2, name).DESCRIPTOR.fields
    assert {(field.name, str(field.number)) for field in theirs} == set(ours)
