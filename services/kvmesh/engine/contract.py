"""What a worker asks of an engine, and what an engine answers.

The contract is push-style and batched: one `StepOutput` an engine step with
everything that the step brought, for all requests. The engine hands it to its
`OutputSink`, from whatever runs it: a thread of its own, an event loop that
reads another process, or neither. The sink takes it at once and never waits,
so an engine needs no queue towards its worker. In a worker the sink is native
(`kvmesh._router.WorkerPort`), and columns (`Column`) cost it no object a token.

Everything of a request's life is told in terms of an *attempt*: one placement
of one generation. An attempt is answered by one `Opening` and, if that was
`Reserved`, ended by exactly one `StageEnd`. Within a `RouterStep` the order is
openings, tokens, ends, as on the wire (worker.proto, StepOutput).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy.typing as npt

from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

ROOM_TOKENS = 64
"""Tokens of output that room is reserved for besides the prompt (DESIGN 4)."""
ALONE_TOKENS = 32
"""New tokens after which a suspect shares its steps again (DESIGN 5)."""


class AttemptId(NamedTuple):
    """Identity of an attempt; also the fence that tells stale from current."""

    generation: bytes
    """16 bytes."""
    owner: int
    attempt: int

    def opening(self, stage: Stage) -> wire.Opening:
        """An answer to its Place, without the answer."""
        return wire.Opening(
            generation=self.generation,
            owner=self.owner,
            attempt=self.attempt,
            stage=stage.value,
        )

    def stage_end(self, stage: Stage, timings: wire.StageTimings, **end: Any) -> wire.StageEnd:
        """The one end of a stage; `end` is one field of StageEnd's `end`."""
        message = wire.StageEnd(
            generation=self.generation,
            owner=self.owner,
            attempt=self.attempt,
            stage=stage.value,
            timings=timings,
        )
        for name, value in end.items():
            getattr(message, name).CopyFrom(value)
            # An end without fields is there all the same.
            getattr(message, name).SetInParent()
        return message


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
    prompt_ids: bytes | None = None
    """Token ids of the prompt, packed as u32; None: those of `continuation`, which
    takes milliseconds of the engine thread for a long prompt."""
    hand_off: wire.HandOff | None = None
    prefix_from: wire.PrefixSource | None = None
    request_id: str = ""
    traceparent: str = ""
    alone: bool = False
    trace: bool = False


Column = Sequence[int] | npt.NDArray[Any] | bytes
"""Integers: packed bytes of u32 (of u64 for chain values) in the machine's
order, an array of these, or any other sequence; the first are read fastest."""


def integers(column: Column) -> list[int]:
    """A column of u32, as a list."""
    return [*memoryview(column).cast("I")] if isinstance(column, bytes) else [*map(int, column)]


@dataclass(slots=True)
class TokenColumns:
    """New tokens of all requests of one router, by columns (wire: TokenRows).

    Row i is `generations[16 * i : 16 * i + 16]`, `owners[i]`, `attempts[i]`,
    `first_indices[i] + index_offset`, `counts[i]` and the next `counts[i]` of `ids`. Columns
    let a step of 64 streams cost some microseconds of Python, not some a token.
    """

    generations: bytes = b""
    owners: Column = ()
    attempts: Column = ()
    first_indices: Column = ()
    counts: Column = ()
    ids: Column = ()
    index_offset: int = 0
    """Added to each of `first_indices`: these then last from step to step."""
    logprobs: Sequence[wire.RowLogprobs] = ()


@dataclass(slots=True)
class RouterStep:
    """What one step brought for one router."""

    openings: list[wire.Opening] = field(default_factory=list)
    tokens: TokenColumns | None = None
    ends: list[wire.StageEnd] = field(default_factory=list)


class StepSample(NamedTuple):
    """Service time of a step and what it held (wire: StepSample)."""

    prefill_tokens: int = 0
    prefill_context: int = 0
    decode_batch: int = 0
    decode_context: int = 0
    duration_us: int = 0


STORED: Literal[0] = 0
"""Kind of a `CacheChange`: a run of blocks became full, each the child of the one before."""
REMOVED: Literal[1] = 1
"""Kind of a `CacheChange`: blocks are gone; `parent` is 0."""
CLEARED: Literal[2] = 2
"""Kind of a `CacheChange`: all blocks are gone."""


class CacheChange(NamedTuple):
    """One change of the prefix cache (wire: CacheEvent)."""

    kind: int
    """STORED, REMOVED or CLEARED."""
    parent: int
    """Chain value of the parent of a stored run's first block."""
    chain: Column
    """Chain value at the end of each block; at most 4,096."""


@dataclass(slots=True)
class CacheBatch:
    """Changes of the prefix cache in order, numbered from `first_event`."""

    first_event: int
    changes: Sequence[CacheChange]


class KvRoom(NamedTuple):
    """The KV pool by state, in blocks (wire: KvRoom)."""

    free: int = 0
    evictable: int = 0
    running: int = 0
    pinned: int = 0
    reserved: int = 0


@dataclass(slots=True)
class ClassShare:
    """The requests of one class in a share (wire: ClassShare)."""

    waiting: int = 0
    waiting_tokens: int = 0
    decoding: int = 0


@dataclass(slots=True)
class LoadShare:
    """A router session's share of the work (wire: LoadShare)."""

    queued: int = 0
    queued_prefill_tokens: int = 0
    running_prefill_tokens: int = 0
    decoding: int = 0
    decode_context: int = 0
    receiving: int = 0
    interactive: ClassShare = field(default_factory=ClassShare)
    standard: ClassShare = field(default_factory=ClassShare)
    batch: ClassShare = field(default_factory=ClassShare)

    def of_class(self, request_class: inference.RequestClass) -> ClassShare:
        """The part that a request of this class counts in; a router may weigh it by class."""
        match request_class:
            case inference.REQUEST_CLASS_INTERACTIVE:
                return self.interactive
            case inference.REQUEST_CLASS_BATCH:
                return self.batch
            case _:
                return self.standard


@dataclass(slots=True)
class EngineLoad:
    """State of an engine at one moment (wire: Load, without the session part)."""

    kv: KvRoom = field(default_factory=KvRoom)
    shares: dict[str, LoadShare] = field(default_factory=dict)
    """Work by router session."""
    step: int = 0
    """Number of the running step, or of the last one."""
    step_age_ms: float = 0.0
    step_predicted_ms: float = 0.0
    """Both 0 when no step runs."""


@dataclass(slots=True)
class StepOutput:
    """What one engine step brought. `step` 0: between steps."""

    step: int = 0
    routers: dict[str, RouterStep] = field(default_factory=dict)
    sample: StepSample | None = None
    """Service time of the step; None between steps."""
    load: EngineLoad = field(default_factory=EngineLoad)
    """State now."""
    cache: CacheBatch | None = None
    """What changed in the prefix cache since the last output."""


class OutputSink(Protocol):
    """Takes what an engine says. No call waits, and none keeps what it is given:
    an engine may change it afterwards. From any thread, one at a time."""

    def begin_step(self, predicted_ms: float) -> None:
        """A step begins. Engines that cannot tell leave it out."""

    def step(self, output: StepOutput) -> None:
        """One call an engine step, and calls between steps: at the start, when a
        placement is answered, an attempt ends, or the load has changed. Raises ValueError
        for columns that do not fit each other and for a gap in cache events."""

    def ended(self) -> None:
        """The engine says nothing more. Before `close` that is a failure."""


class Engine(Protocol):
    """An engine. All methods may be called from any thread, and none blocks."""

    def start(self, sink: OutputSink) -> None:
        """Loads nothing; begins to work. Called once."""

    def submit(self, placement: Placement) -> None:
        """Takes a placement; its `Opening` goes to the sink."""

    def hand_over(
        self, attempt: AttemptId, next_attempt: int, hand_off: wire.HandOff, border: int
    ) -> None:
        """Passes a running attempt on, as HandOver in worker.proto.

        `border` is the first output index that the receiver was not given.

        An engine that cannot goes on with it, and fails the transfer, so that
        the receiver does not wait.
        """

    def cancel(self, attempts: Iterable[AttemptId]) -> None:
        """Ends attempts at the next layer or step border and frees their blocks.

        An attempt that is not known, or has ended, is ignored.
        """

    def snapshot(self) -> Iterator[Sequence[CacheChange]]:
        """Parts of the cache's content, stores only, hottest first.

        Takes time, so call it on a thread of its own; it never holds an engine
        step. The parts may be read at different moments: all events after the
        last one that was told before the call are applied over them by the
        receiver, in order (worker.proto, SnapshotPart).
        """

    def load(self) -> EngineLoad:
        """State now, as in the newest output or newer."""

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
