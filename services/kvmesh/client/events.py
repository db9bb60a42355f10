"""What a client gets back: plain, typed, immutable values.

Units are those of inference.proto: times in milliseconds, counts in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvmesh.v1 import inference_pb2 as wire

FinishReason = Literal["stop", "length", "unknown"]
"""unknown: one that this release has no name for; the router is newer."""

_REASONS: dict[int, FinishReason] = {
    wire.FINISH_REASON_STOP: "stop",
    wire.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was admitted. First event of every stream."""

    generation_id: str
    seed: int
    prompt_tokens: int
    max_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class Placed:
    """The generation was placed; only with `placements=True`."""

    attempt: int
    cached_tokens: int
    pulled_tokens: int
    prefill_worker: str
    decode_worker: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one output position."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output tokens in order; `text` is what they complete."""

    first_index: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens; each is counted once."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    pulled_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in milliseconds (Timings in inference.proto)."""

    queue_ms: float = 0.0
    tokenize_ms: float = 0.0
    decide_ms: float = 0.0
    worker_queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    transfer_tail_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0
    longest_gap_ms: float = 0.0
    transferred_bytes: int = 0
    longest_gap_start_ms: float = 0.0
    longest_gap_cause: str = ""


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """One thing that the generation did or waited for; only with `trace=True`."""

    name: str
    start_ms: float
    duration_ms: float
    tokens: int
    attempt: int
    cause: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a successful generation. Last event of every stream."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    stop_string: str = ""
    stop_token_id: int | None = None
    text: str = ""
    """Text that was held back until the end."""
    trace: tuple[TraceSpan, ...] = ()


Event = Accepted | Placed | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Result:
    """A whole generation."""

    generation_id: str
    model: str
    seed: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_string: str = ""
    stop_token_id: int | None = None
    trace: tuple[TraceSpan, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def event_from_wire(response: wire.GenerateResponse) -> Event | None:
    """The event that a message holds; None for kinds newer than this client."""
    kind = response.WhichOneof("event")
    if kind == "tokens":
        return _tokens(response.tokens)
    if kind == "accepted":
        a = response.accepted
        return Accepted(a.generation_id, a.seed, a.prompt_tokens, a.max_tokens, a.model)
    if kind == "placed":
        p = response.placed
        return Placed(
            p.attempt, p.cached_tokens, p.pulled_tokens, p.prefill_worker, p.decode_worker
        )
    if kind == "finished":
        return _finished(response.finished)
    return None


def _tokens(t: wire.Tokens) -> Tokens:
    logprobs = tuple(
        TokenLogprobs(p.logprob, tuple(zip(p.top_ids, p.top_logprobs, strict=True)))
        for p in t.logprobs
    )
    return Tokens(t.first_index, tuple(t.ids), t.text, logprobs)


def _finished(f: wire.Finished) -> Finished:
    return Finished(
        finish_reason=_REASONS.get(f.reason, "unknown"),
        usage=Usage(*(getattr(f.usage, name) for name in Usage.__slots__)),
        timings=Timings(*(getattr(f.timings, name) for name in Timings.__slots__)),
        stop_string=f.stop_string,
        stop_token_id=f.stop_token_id if f.HasField("stop_token_id") else None,
        text=f.text,
        trace=tuple(
            TraceSpan(s.name, s.start_ms, s.duration_ms, s.tokens, s.attempt, s.cause)
            for s in f.trace
        ),
    )


class ResultBuilder:
    """Folds the events of one stream into a `Result`."""

    def __init__(self) -> None:
        self._accepted: Accepted | None = None
        self._finished: Finished | None = None
        self._ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, event: Event) -> None:
        """Takes the next event."""
        match event:
            case Accepted():
                self._accepted = event
            case Tokens():
                self._ids.extend(event.ids)
                self._text.append(event.text)
                self._logprobs.extend(event.logprobs)
            case Finished():
                self._finished = event
                self._text.append(event.text)
            case Placed():
                pass

    def extend(self, events: Iterable[Event]) -> ResultBuilder:
        """Takes many events."""
        for event in events:
            self.add(event)
        return self

    def result(self) -> Result:
        """The whole. Raises `ValueError` where the stream had no end."""
        if self._accepted is None or self._finished is None:
            raise ValueError("the stream ended without `accepted` and `finished`")
        a, f = self._accepted, self._finished
        return Result(
            generation_id=a.generation_id,
            model=a.model,
            seed=a.seed,
            token_ids=tuple(self._ids),
            text="".join(self._text),
            finish_reason=f.finish_reason,
            usage=f.usage,
            timings=f.timings,
            logprobs=tuple(self._logprobs),
            stop_string=f.stop_string,
            stop_token_id=f.stop_token_id,
            trace=f.trace,
        )
