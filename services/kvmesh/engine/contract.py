"""What a worker asks of an engine, and what an engine answers.

The contract is push-style and batched: one `StepOutput` an engine step with
everything that the step brought, for all requests. It never assumes who owns
the loop: an engine may have its own thread, its own process or neither.

Everything of a request's life is told in terms of an *attempt*: one placement
of one generation. An attempt is answered by one `Opening` and, if that was
`Reserved`, ended by exactly one `StageEnd`. Within a `RouterStep` the order is
openings, tokens, ends, as on the wire (worker.proto, StepOutput).
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvmesh.v1 import worker_pb2 as wire


class AttemptId(NamedTuple):
    """Identity of an attempt; also the fence that tells stale from current."""

    generation: bytes
    """16 bytes."""
    owner: int
    attempt: int


class Stage(enum.IntEnum):
    """Which part of a generation is asked for. Values as on the wire."""

    WHOLE = wire.STAGE_WHOLE
    PREFILL = wire.STAGE_PREFILL
    DECODE = wire.STAGE_DECODE


@dataclass(frozen=True, slots=True)
class Placement:
    """A stage of an attempt, as a router placed it."""

    id: AttemptId
    router: str
    """Router session that gets the answers (`StepOutput.routers` key)."""
    stage: Stage
    continuation: wire.Continuation
    """Times in it count from `received_at`."""
    received_at: float
    """`time.monotonic()` at which the frame was read."""
    hand_off: wire.HandOff | None = None
    prefix_from: wire.PrefixSource | None = None
    request_id: str = ""
    traceparent: str = ""
    alone: bool = False
    trace: bool = False


@dataclass(slots=True)
class TokenColumns:
    """New tokens of all requests of one router, by columns (wire: TokenRows).

    Row i is `generations[16 * i : 16 * i + 16]`, `owners[i]`, `attempts[i]`,
    `first_indices[i]`, `counts[i]` and the next `counts[i]` of `ids`. Columns
    let a step of 64 streams cost some microseconds of Python, not some a token.
    """

    generations: bytes = b""
    owners: Sequence[int] = ()
    attempts: Sequence[int] = ()
    first_indices: Sequence[int] = ()
    counts: Sequence[int] = ()
    ids: Sequence[int] = ()
    logprobs: Sequence[wire.RowLogprobs] = ()


@dataclass(slots=True)
class RouterStep:
    """What one step brought for one router."""

    openings: list[wire.Opening] = field(default_factory=list)
    tokens: TokenColumns | None = None
    ends: list[wire.StageEnd] = field(default_factory=list)


@dataclass(slots=True)
class StepOutput:
    """What one engine step brought. `step` 0: between steps."""

    step: int
    routers: Mapping[str, RouterStep]
    sample: wire.StepSample | None = None
    """Service time of the step; None between steps."""


@dataclass(slots=True)
class CacheBatch:
    """Changes of the prefix cache in order, numbered from `first_event`."""

    first_event: int
    events: Sequence[wire.CacheEvent]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """State of an engine at one moment (wire: Load, without the session part)."""

    kv: wire.KvRoom
    shares: Mapping[str, wire.LoadShare]
    """Work by router session."""
    step: int
    step_age_ms: float
    step_predicted_ms: float


class Engine(Protocol):
    """An engine. All methods may be called from any thread, and none blocks."""

    def start(self) -> None:
        """Loads nothing; begins to work. Called once."""

    def submit(self, placement: Placement) -> None:
        """Takes a placement; the answer is an `Opening` in `outputs`."""

    def hand_over(self, attempt: AttemptId, next_attempt: int, hand_off: wire.HandOff) -> None:
        """Passes a running attempt on, as HandOver in worker.proto."""

    def cancel(self, attempts: Iterable[AttemptId]) -> None:
        """Ends attempts at the next layer or step border and frees their blocks.

        An attempt that is not known, or has ended, is ignored.
        """

    def outputs(self) -> AsyncIterator[StepOutput]:
        """One item an engine step, and items between steps. One reader."""

    def events(self) -> AsyncIterator[CacheBatch]:
        """Cache changes, one batch a step at most. One reader."""

    def snapshot(self) -> AsyncIterator[tuple[int, Sequence[wire.CacheEvent]]]:
        """Parts of the cache's content, hottest first, as (last event, stores).

        Never holds an engine step: the parts may be read at different moments.
        All events after the first part's number are applied over them by the
        receiver, in order (worker.proto, SnapshotPart). A store's run is at
        most 4,096 blocks, and so is one of `events`.
        """

    def load(self) -> EngineLoad:
        """State now; cheap enough for every step."""

    def residue(self) -> wire.Residue:
        """What is held; all zero when nothing runs."""

    def capabilities(self) -> wire.Capabilities:
        """What it can do; does not change after `start`."""

    def step_model(self) -> wire.StepModel:
        """Predicted step times, fitted by warm-up."""

    @property
    def transfer_address(self) -> str:
        """Address of the transfer node, "host:port"; empty: none."""

    async def close(self) -> None:
        """Ends all attempts and frees everything. Idempotent."""
