"""A Continuation's sampling, stops and grammar as vLLM's SamplingParams.

One to one, or refused by the field's name in GenerateRequest: nothing is left
out silently.
"""

from __future__ import annotations

from typing import Any

from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

_SEED_MASK = (1 << 63) - 1
# From the fractional part of the golden ratio: spreads borders over all bits.
_SEED_STEP = 0x9E3779B97F4A7C15

_LARGEST_TEMPERATURE = 2.0
"""vLLM's own bound."""

FIELDS = {
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "logit_bias": "sampling.logit_bias",
    "seed": "sampling.seed",
    "logprobs": "output.logprobs",
    "max_tokens": "stopping.max_tokens",
    "min_tokens": "stopping.min_tokens",
    "stop_token_ids": "stopping.stop_token_ids",
    "structured_outputs": "grammar",
}
"""vLLM's names of parameters, and those of GenerateRequest."""


class UnsupportedError(ValueError):
    """vLLM cannot do what is asked."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        """Path in GenerateRequest."""


def sampling_arguments(
    continuation: wire.Continuation, *, room: int, max_logprobs: int, seeded: bool = True
) -> dict[str, Any]:
    """Arguments of SamplingParams; "grammar" holds those of StructuredOutputsParams.

    `room`: tokens that the context leaves. Output so far is prompt to vLLM, so what
    counts from the border on is reduced by it. `seeded`: whether vLLM can draw by a seed of the
    request's own; else one that a client gave is refused. Raises UnsupportedError.
    """
    border = len(continuation.output_ids)
    given = continuation.sampling
    _check(continuation, border)
    if given.temperature > 0 and given.seed_given and not seeded:
        raise UnsupportedError(
            FIELDS["seed"],
            "this engine cannot draw by a seed; leave it out, or set temperature to 0",
        )
    left = min(continuation.max_tokens - border, room)
    if left < 1:
        raise UnsupportedError("stopping.max_tokens", "no token is left to be made")
    arguments: dict[str, Any] = {
        "temperature": given.temperature,
        "top_k": given.top_k,
        "top_p": given.top_p,
        "min_p": given.min_p,
        "repetition_penalty": given.repetition_penalty,
        "frequency_penalty": given.frequency_penalty,
        "presence_penalty": given.presence_penalty,
        "max_tokens": left,
        "min_tokens": min(left, max(0, continuation.min_tokens - border)),
        # The router says what ends a text, the model's own ends included.
        "ignore_eos": True,
        "stop_token_ids": list(continuation.stop_token_ids),
        "detokenize": False,
        "skip_clone": True,
    }
    if given.temperature > 0 and seeded:
        # vLLM's draws go by their number in its request: after the border they
        # would be those of the first tokens again.
        arguments["seed"] = (given.seed + border * _SEED_STEP) & _SEED_MASK
    if given.logit_bias:
        arguments["logit_bias"] = {bias.token_id: bias.bias for bias in given.logit_bias}
    if continuation.HasField("logprobs"):
        if not max_logprobs or continuation.logprobs > max_logprobs:
            raise UnsupportedError(
                FIELDS["logprobs"],
                f"logprobs is {continuation.logprobs}; this engine tells of "
                f"{f'up to {max_logprobs} alternatives' if max_logprobs else 'none'}",
            )
        arguments["logprobs"] = continuation.logprobs
    if continuation.HasField("grammar"):
        arguments["grammar"] = _grammar(continuation.grammar)
    return arguments


def _check(continuation: wire.Continuation, border: int) -> None:
    given = continuation.sampling
    if given.temperature > _LARGEST_TEMPERATURE:
        raise UnsupportedError(
            "sampling.temperature",
            f"temperature is {given.temperature:g}; vLLM takes up to {_LARGEST_TEMPERATURE:g}",
        )
    if not border:
        return
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(given, name):
            raise UnsupportedError(
                f"sampling.{name}", f"vLLM cannot go on with {name}: it counts its own output only"
            )
    if continuation.HasField("grammar"):
        raise UnsupportedError(
            "grammar", "vLLM cannot take a grammar up in the middle of an output"
        )


def _grammar(grammar: inference.Grammar) -> dict[str, Any]:
    match grammar.WhichOneof("kind"):
        case "json_schema":
            return {"json": grammar.json_schema}
        case "regex":
            return {"regex": grammar.regex}
        case "ebnf":
            return {"grammar": grammar.ebnf}
        case "json_object":
            return {"json_object": True}
        case _:
            raise UnsupportedError("grammar", "the grammar is empty")
