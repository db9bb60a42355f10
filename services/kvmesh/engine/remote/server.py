"""What is asked of a server, whatever it speaks, and what it answers."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvmesh.engine.vllm import border
from kvmesh.v1 import worker_pb2 as wire

INVALID_ARGUMENT, UNAVAILABLE = 3, 14  # google.rpc.Code

FINISHED = {"stop": border.STOP, "length": border.LENGTH, "abort": border.ABORT}
"""Finish reasons by the names that servers have for them; any other is an error."""


class SaltedPrompts(enum.StrEnum):
    """What becomes of prompts with a cache salt where a server's API has none.

    Routers with keys salt every prompt, so that no tenant can tell by its times what
    another one has asked.
    """

    REFUSE = "refuse"
    """They are refused, and routers send none."""
    UNCACHED = "uncached"
    """No prompt finds anything in the cache, for servers that can be asked for that."""
    SHARED = "shared"
    """They are served without their salt: all share one cache, and whoever attached the
    server takes it that they may."""


class ServerError(border.VllmError):
    """A server cannot do something. The text is for people."""

    code = UNAVAILABLE
    retryable = True


class UnreachableError(ServerError):
    """It does not answer: it may be gone."""


class LostError(UnreachableError):
    """It is gone, or is another one now. What it ran is lost."""


class FailedError(ServerError):
    """It answers, and failed at this request."""


class RejectedError(ServerError):
    """It refuses a request, as any other server of the kind would."""

    retryable = False

    def __init__(self, message: str, code: int = INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.code = code


class UnusableError(ServerError):
    """It cannot be attached as it is: somebody has to change something."""


@dataclass(slots=True)
class Sampling:
    """As vllm.SamplingParams, so that the stages of a placement are made in one place."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    max_tokens: int | None
    min_tokens: int
    stop_token_ids: list[int] | None
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    structured_outputs: object | None = None
    """`{kind: text}` with kind json, regex, grammar or json_object."""
    extra_args: dict[str, Any] | None = None
    _all_stop_token_ids: set[int] = field(default_factory=set)

    @property
    def grammar(self) -> tuple[str, str] | None:
        """Kind and text of what the output is restricted to."""
        given = self.structured_outputs
        if not isinstance(given, dict) or not given:
            return None
        kind, text = next(iter(given.items()))
        return str(kind), str(text)

    @property
    def transfer(self) -> dict[str, Any] | None:
        """What the KV connector is told."""
        return (self.extra_args or {}).get("kv_transfer_params")


@dataclass(slots=True)
class Request:
    """One request to a server; to the loop it is what goes to the core."""

    request_id: str
    prompt: list[int]
    sampling_params: Sampling
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""
    uncached: bool = False
    """All of its prompt is computed, whatever the server has of it."""
    abort_immediately: bool = False


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of new tokens: in each row the token drawn, then the likeliest."""

    logprob_token_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)

    def add(self, token: int, logprob: float, others: Sequence[tuple[int, float]]) -> None:
        """A token and alternatives in any order, the token among them or not."""
        likeliest = sorted(others, key=lambda other: -other[1])
        self.logprob_token_ids.append([token, *(id for id, _ in likeliest)])
        self.logprobs.append([logprob, *(value for _, value in likeliest)])


@dataclass(slots=True)
class Part:
    """What a message of a server brought for a request."""

    ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    cached_tokens: int | None = None
    """Of the prompt, found in its cache. None where it does not say, or not yet."""
    finish_reason: int | None = None
    """As of vLLM's core: border.STOP, LENGTH, ABORT, ERROR."""
    stop_token_id: int | None = None
    transfer: dict[str, Any] | None = None
    """What the KV connector said."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a server is, other clients' requests included."""

    running: int
    waiting: int
    usage: float
    """Share of the KV pool that requests hold, 0 to 1."""


@dataclass(frozen=True, slots=True)
class CacheBatch:
    """Changes of a server's prefix cache that were told together."""

    number: int | None
    """None: there are none, only load."""
    events: Sequence[Mapping[str, Any]] = ()
    """As vLLM's publisher has them."""
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """What a server says of itself."""

    engine: str
    """For people."""
    model: str
    """Name that clients ask for."""
    path: str
    """What it loaded the model from; names the model where nothing better does."""
    context_length: int
    """0: it does not say."""
    vocabulary_size: int = 0
    """0: it does not say."""
    end_of_text_ids: tuple[int, ...] = ()
    block_tokens: int = 0
    """0: it does not say."""
    pool_tokens: int = 0
    """0: it does not say."""
    max_batch: int = 0
    """Most requests in a step. 0: it does not say."""
    connector: str = ""
    """Name of its KV connector. Empty: none."""
    kv_dtype: str = ""
    cache_events: bool = False
    max_logprobs: int = 0
    lacks: frozenset[str] = frozenset()
    """What its wire cannot carry: names of Sampling's fields, "cache_salt", "priority", and
    "grammar.KIND"."""
    skips_cache: bool = False
    """It can be asked to compute all of a prompt, whatever it has of it."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Digests by name."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of its tokeniser and its model's config.json, generation_config.json."""


class Server(Protocol):
    """A server. To be used in one event loop."""

    ends_dropped: bool
    """Whether a request ends with its stream; else only by `abort`."""

    async def describe(self) -> Description:
        """Raises UnreachableError, UnusableError."""

    async def check(self) -> None:
        """Raises UnreachableError where it does not answer or is not well, LostError where it
        serves another model by now."""

    def generate(self, request: Request) -> AsyncGenerator[Part, None]:
        """Runs a request. Raises ServerError. Closed: its stream is dropped."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests; those that are not known are ignored. Raises ServerError."""

    async def load(self) -> Load | None:
        """None: it does not say. Raises UnreachableError."""

    def cache_batches(self) -> AsyncGenerator[CacheBatch, None]:
        """Changes of its cache from now on, in order. Raises ServerError; where it just ends,
        some may be missing."""

    async def close(self) -> None:
        """Drops what is open."""


def failure(error: ServerError) -> wire.StageFailed:
    """How a stage ends by it."""
    return wire.StageFailed(
        code=error.code, reason="ENGINE", message=str(error), retryable=error.retryable
    )
