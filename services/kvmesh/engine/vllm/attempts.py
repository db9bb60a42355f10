"""Attempts in a vLLM engine, from their placement to their end.

::

    submit ─▶ HELD ──▶ WAITING ──first token──▶ DECODING ─▶ ended
                  └──▶ RECEIVING (stage decode) ──┘

vLLM does not say when it begins a prompt: that shows in the prompt tokens of
its steps, which are taken to be those of the most urgent that wait.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from kvmesh.engine.contract import ALONE_TOKENS, AttemptId, LoadShare, Placement, Stage
from kvmesh.engine.core.trace import Trace
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire


class Phase(enum.Enum):
    """Where an attempt is."""

    HELD = enum.auto()
    """Not given to vLLM yet: a suspect is to run alone, or runs."""
    WAITING = enum.auto()
    """Its prompt is not computed."""
    RECEIVING = enum.auto()
    """Waits for KV from the worker that computed its prompt."""
    DECODING = enum.auto()


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt."""

    id: AttemptId
    request_id: str
    """Its name in vLLM."""
    router: str
    stage: Stage
    request_class: inference.RequestClass
    received_at: float
    """Seconds, monotonic."""
    priority: int
    """Virtual deadline, milliseconds, monotonic: lower is sooner."""
    length: int
    """Tokens known: prompt and output."""
    next_index: int
    """Output index of its next token."""
    alone: bool
    waited_ms: float = 0.0
    """Age of the request when it came."""
    held_tokens: int = 0
    """Of these, cached here when it came."""
    wants_logprobs: int | None = None
    """Alternatives with each token."""
    phase: Phase = Phase.HELD
    computed: int = 0
    """Prompt tokens that are taken to be computed, cached ones included."""
    made: int = 0
    """New tokens."""
    scheduled_at: float = 0.0
    prompt_done_at: float = 0.0
    cached_tokens: int = 0
    computed_tokens: int = 0
    trace: Trace | None = None

    @classmethod
    def of(cls, placement: Placement, length: int, held_tokens: int) -> Attempt:
        """A placement, as it begins."""
        continuation, (generation, owner, number) = placement.continuation, placement.id
        deadline = placement.received_at + continuation.virtual_deadline_ms / 1000
        return cls(
            id=placement.id,
            request_id=f"{generation.hex()}-{owner}-{number}",
            router=placement.router,
            stage=placement.stage,
            request_class=continuation.request_class,
            received_at=placement.received_at,
            priority=int(deadline * 1000),
            length=length,
            next_index=len(continuation.output_ids),
            alone=placement.alone,
            waited_ms=continuation.waited_ms,
            held_tokens=held_tokens,
            wants_logprobs=continuation.logprobs if continuation.HasField("logprobs") else None,
            computed=held_tokens,
            trace=Trace(placement.received_at, continuation.waited_ms / 1000)
            if placement.trace
            else None,
        )

    @property
    def left(self) -> int:
        """Prompt tokens that are still to be computed."""
        return max(1, self.length - self.computed)

    @property
    def solitary(self) -> bool:
        """Whether nobody may share its steps."""
        return self.alone and self.made < ALONE_TOKENS

    def timings(self) -> wire.StageTimings:
        """What its stage took."""
        queued = self.scheduled_at - self.received_at if self.scheduled_at else 0.0
        prefill = self.prompt_done_at - self.scheduled_at if self.prompt_done_at else 0.0
        return wire.StageTimings(
            queue_ms=max(0.0, queued * 1000),
            prefill_ms=max(0.0, prefill * 1000),
            cached_tokens=self.cached_tokens,
            computed_tokens=self.computed_tokens,
            trace=self.trace.spans() if self.trace is not None else (),
        )


def shares(attempts: Iterable[Attempt]) -> dict[str, LoadShare]:
    """Work by router session, as load reports tell it."""
    found: dict[str, LoadShare] = {}
    for attempt in attempts:
        share = found.get(attempt.router)
        if share is None:
            share = found[attempt.router] = LoadShare()
        of_class = share.of_class(attempt.request_class)
        match attempt.phase:
            case Phase.DECODING:
                share.decoding += 1
                share.decode_context += attempt.length
                of_class.decoding += 1
            case Phase.RECEIVING:
                share.receiving += 1
                of_class.decoding += 1
            case Phase.HELD | Phase.WAITING:
                of_class.waiting += 1
                of_class.waiting_tokens += attempt.left
                if attempt.computed > attempt.held_tokens:
                    share.running_prefill_tokens += attempt.left
                else:
                    share.queued += 1
                    share.queued_prefill_tokens += attempt.left
    return found
