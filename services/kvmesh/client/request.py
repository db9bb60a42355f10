"""From Python arguments to a `GenerateRequest`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from kvmesh.v1 import inference_pb2 as wire

Message = Mapping[str, Any]
"""One chat message: `role` and `content`, and what else the template knows."""

RequestClass = Literal["interactive", "standard", "batch"]

_CLASSES: Mapping[str, wire.RequestClass] = {
    "interactive": wire.REQUEST_CLASS_INTERACTIVE,
    "standard": wire.REQUEST_CLASS_STANDARD,
    "batch": wire.REQUEST_CLASS_BATCH,
}


class GenerateOptions(TypedDict, total=False):
    """Arguments of `generate` and `complete`; meanings as in inference.proto."""

    prompt: str
    messages: Sequence[Message]
    token_ids: Sequence[int]
    model: str
    # Sampling
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    # Stopping
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_end_of_text: bool
    include_stop: bool
    # Output
    text: bool
    logprobs: int
    special_tokens: bool
    kept_special_tokens: Sequence[str]
    placements: bool
    trace: bool
    # Hints
    request_class: RequestClass
    conversation_id: str
    cache_salt: str
    ttft_target_ms: int
    itl_target_ms: int
    resumable: bool
    expected_output_tokens: int
    # Templates and the rest
    tools: Sequence[Mapping[str, Any]]
    template_arguments: Mapping[str, Any]
    add_generation_prompt: bool
    adapter: str
    json_schema: Mapping[str, Any] | str
    n: int


_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "seed",
)  # fmt: skip
_STOPPING = ("max_tokens", "min_tokens", "stop_token_ids", "ignore_end_of_text", "include_stop")
_OUTPUT = (
    "text", "logprobs", "special_tokens", "kept_special_tokens", "placements", "trace",
)  # fmt: skip
_HINTS = (
    "conversation_id", "cache_salt", "ttft_target_ms", "itl_target_ms", "resumable",
    "expected_output_tokens",
)  # fmt: skip
_MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
)


def build_request(options: GenerateOptions) -> wire.GenerateRequest:
    """A request from arguments.

    Raises `TypeError` for an unknown argument and for none or several of
    `prompt`, `messages` and `token_ids`; `ValueError` for a value that has no
    place on the wire. Ranges are the server's to check.
    """
    _check_names(options)
    request = wire.GenerateRequest(model=options.get("model", ""), n=options.get("n", 0))
    _set_input(request, options)
    _copy(request.sampling, options, _SAMPLING)
    for token_id, bias in options.get("logit_bias", {}).items():
        request.sampling.logit_bias.add(token_id=token_id, bias=bias)
    _copy(request.stopping, options, _STOPPING)
    stop = options.get("stop", ())
    request.stopping.stop.extend([stop] if isinstance(stop, str) else stop)
    _copy(request.output, options, _OUTPUT)
    _copy(request.hints, options, _HINTS)
    if "request_class" in options:
        name = options["request_class"]
        if name not in _CLASSES:
            raise ValueError(f"request_class is {name!r}; allowed are {', '.join(_CLASSES)}")
        request.hints.request_class = _CLASSES[name]
    request.adapter = options.get("adapter", "")
    if "json_schema" in options:
        schema = options["json_schema"]
        request.grammar.json_schema = schema if isinstance(schema, str) else json.dumps(schema)
    return request


def build_chat(messages: Sequence[Message], options: GenerateOptions) -> wire.Chat:
    """A conversation from messages as dictionaries of the OpenAI form."""
    chat = wire.Chat()
    for message in messages:
        extra = set(message) - _MESSAGE_KEYS
        if extra or "role" not in message:
            raise ValueError(
                f"a message has the keys {sorted(message)}; needed is role, allowed are "
                f"{sorted(_MESSAGE_KEYS)}"
            )
        chat.messages.add(
            role=message["role"],
            content=message.get("content") or "",
            name=message.get("name", ""),
            tool_calls_json=[json.dumps(call) for call in message.get("tool_calls", ())],
            tool_call_id=message.get("tool_call_id", ""),
            reasoning_content=message.get("reasoning_content") or "",
        )
    chat.tools_json.extend(json.dumps(tool) for tool in options.get("tools", ()))
    if "template_arguments" in options:
        chat.template_arguments_json = json.dumps(options["template_arguments"])
    if "add_generation_prompt" in options:
        chat.add_generation_prompt = options["add_generation_prompt"]
    return chat


def build_tokenize_request(options: GenerateOptions) -> wire.TokenizeRequest:
    """A request for the ids of `prompt` or `messages`.

    Raises `TypeError` for an unknown argument and for none or both of the two.
    """
    _check_names(options)
    _check_input(options, "prompt and messages")
    request = wire.TokenizeRequest(model=options.get("model", ""))
    if "messages" in options:
        request.chat.CopyFrom(build_chat(options["messages"], options))
    else:
        request.prompt = options["prompt"]
    return request


def _check_names(options: GenerateOptions) -> None:
    unknown = set(options) - set(GenerateOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"unknown argument {', '.join(sorted(unknown))}; "
            f"allowed are {', '.join(sorted(GenerateOptions.__annotations__))}"
        )


def _check_input(options: GenerateOptions, allowed: str) -> None:
    given = [key for key in ("prompt", "messages", "token_ids") if key in options]
    if len(given) != 1 or given[0] not in allowed:
        raise TypeError(f"exactly one of {allowed} is needed, given: {', '.join(given) or 'none'}")


def _set_input(request: wire.GenerateRequest, options: GenerateOptions) -> None:
    _check_input(options, "prompt, messages and token_ids")
    if "prompt" in options:
        request.prompt = options["prompt"]
    elif "messages" in options:
        request.chat.CopyFrom(build_chat(options["messages"], options))
    else:
        request.token_ids.ids.extend(options["token_ids"])


def _copy(target: Any, options: GenerateOptions, names: Sequence[str]) -> None:
    for name in names:
        if name in options:
            value = options[name]  # type: ignore[literal-required]
            if isinstance(value, Sequence) and not isinstance(value, str):
                getattr(target, name).extend(value)
            else:
                setattr(target, name, value)
