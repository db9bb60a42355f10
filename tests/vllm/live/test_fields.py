"""The fields of vLLM's own requests, and of SMG's servicer, are those that we know: one that a new
version has is taken or refused before it can be lost."""

import re
from importlib.metadata import files
from pathlib import Path

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

ROOT = Path(__file__).resolve().parents[3]


def test_no_field_of_vllms_http_is_unknown() -> None:
    listed = (ROOT / "tests/structure/test_openai_fields.py").read_text()
    known = re.search(r'VLLM = """(.*?)"""', listed, re.DOTALL)
    assert known is not None
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
    assert fields == set(known[1].split())


def fields_of(message: str, proto: str) -> set[tuple[str, str]]:
    """Names and numbers, from the text: one process cannot hold two messages of one name."""
    body = re.search(rf"^message {message} {{\n(.*?)^}}", proto, re.DOTALL | re.MULTILINE)
    assert body is not None
    return {*re.findall(r"^ +[\w ,.<>]*?(\w+) = (\d+);", body[1], re.MULTILINE)}


@pytest.mark.parametrize("message", ["GenerateRequest", "SamplingParams", "TokenizedInput"])
def test_no_field_of_the_servicers_is_unknown(message) -> None:
    (theirs,) = (of for of in files("smg-grpc-proto") or () if of.name == "vllm_engine.proto")
    ours = ROOT / "proto/vllm/engine.proto"
    known = fields_of(message, ours.read_text())
    assert known
    assert fields_of(message, theirs.read_text()) == known
