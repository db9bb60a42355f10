"""Arguments become the request that they say."""

import pytest

from kvmesh.client.request import build_request, build_tokenize_request
from kvmesh.v1 import inference_pb2 as wire


def test_every_argument_reaches_its_field() -> None:
    request = build_request(
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "model": "m",
            "temperature": 0.0,
            "top_k": 4,
            "logit_bias": {7: -1.5},
            "seed": 9,
            "max_tokens": 5,
            "stop": "END",
            "stop_token_ids": [1, 2],
            "logprobs": 0,
            "request_class": "interactive",
            "resumable": True,
            "tools": [{"type": "function"}],
        }
    )
    assert request.chat.messages[0].content == "Hi"
    assert list(request.chat.tools_json) == ['{"type": "function"}']
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0.0
    assert (request.sampling.top_k, request.sampling.seed) == (4, 9)
    assert request.sampling.logit_bias[0].token_id == 7
    assert list(request.stopping.stop) == ["END"]
    assert list(request.stopping.stop_token_ids) == [1, 2]
    assert request.output.HasField("logprobs")
    assert request.hints.request_class == wire.REQUEST_CLASS_INTERACTIVE
    assert request.hints.resumable


def test_what_a_message_says_reaches_its_field() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi", "name": "n"},
        {"role": "assistant", "content": None, "reasoning_content": "So.", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    user, assistant, tool = build_request({"messages": messages}).chat.messages
    assert (user.content, user.name) == ("Hi", "n")
    assert (assistant.content, assistant.reasoning_content) == ("", "So.")
    assert '"name": "f"' in assistant.tool_calls_json[0]
    assert tool.tool_call_id == "c"
    with pytest.raises(ValueError, match="allowed are"):
        build_request({"messages": [{"role": "user", "contents": "Hi"}]})


@pytest.mark.parametrize("options", [{}, {"prompt": "a", "token_ids": [1]}])
def test_exactly_one_input_is_needed(options) -> None:
    with pytest.raises(TypeError, match="exactly one of prompt, messages and token_ids"):
        build_request(options)


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(TypeError, match="unknown argument temprature; allowed are"):
        build_request({"prompt": "a", "temprature": 1})
    with pytest.raises(ValueError, match="interactive, standard, batch"):
        build_request({"prompt": "a", "request_class": "urgent"})


@pytest.mark.parametrize("options", [{}, {"token_ids": [1]}, {"prompt": "a", "messages": []}])
def test_tokenizing_needs_one_text(options) -> None:
    with pytest.raises(TypeError, match="exactly one of prompt and messages is needed, given: "):
        build_tokenize_request(options)


def test_tokenizing_names_what_is_unknown() -> None:
    with pytest.raises(TypeError, match="unknown argument mesages; allowed are"):
        build_tokenize_request({"prompt": "a", "mesages": []})
