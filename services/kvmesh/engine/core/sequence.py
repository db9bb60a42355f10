"""One attempt inside the engine, from its placement to its end.

::

    submit ─▶ QUEUED ──room──▶ PREFILLING ──last chunk──▶ DECODING ─▶ ENDED
                 │  ▲               │ ▲
                 │  └─ room taken ──┘ │ prefix here, or not
                 └──room, prefix_from─▶ FETCHING
    submit ─▶ RECEIVING (stage decode) ──commit──▶ DECODING (or PREFILLING the
                                                   last token: on_finish)
    DECODING ──handed over with its KV (hand_over.py)──▶ ENDED

Every state may go to ENDED. A prefill whose room is taken by a more urgent
one keeps what it computed as cached prefix and waits again.
"""

from __future__ import annotations

import enum
from array import array
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.engine.contract import AttemptId, Placement, Stage
from kvmesh.engine.core.blocks import Root
from kvmesh.engine.core.runner import SampleSpec
from kvmesh.engine.core.trace import Trace
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

_KEPT_LOGPROBS = 128
"""Entries kept for whoever takes a stream over: more than a hand-over lets it make."""


class State(enum.Enum):
    """Where an attempt is."""

    QUEUED = enum.auto()
    FETCHING = enum.auto()
    """Pulls a prefix from another worker."""
    PREFILLING = enum.auto()
    RECEIVING = enum.auto()
    """Waits for KV from the worker that computes the prompt."""
    DECODING = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True)
class Times:
    """What `StageTimings` tells; seconds on the engine's clock."""

    first_step: float = 0.0
    prefill_end: float = 0.0
    transfer_ms: float = 0.0
    transferred_bytes: int = 0
    cached_tokens: int = 0
    pulled_tokens: int = 0
    computed_tokens: int = 0
    kv_came: float = 0.0
    """When the KV of the whole sequence had come from another worker; 0: it did not."""
    tail_ms: float = 0.0
    """From the word that the prompt is computed to then."""
    decode_step: float = 0.0
    """When the first step began that decoded with that KV."""
    urgent: bool = False
    """More urgent than all other prompts here when it came."""


class Sequence:
    """Tokens, blocks and progress of one attempt. Used by the engine thread."""

    __slots__ = (
        "alone", "base", "blocks", "border", "computed", "continuation", "deadline",
        "id", "itl_target_ms", "key", "limit", "logprobs", "look_at", "output_ids", "placement",
        "priority", "prompt_ids", "root", "router", "sample", "stage", "state",
        "stop_ids", "stored", "tag", "times", "trace",
    )  # fmt: skip

    def __init__(
        self, placement: Placement, key: int, root: Root, context_limit: int, max_logprobs: int
    ) -> None:
        continuation = placement.continuation
        self.placement = placement
        self.continuation = continuation
        self.id: AttemptId = placement.id
        self.router = placement.router
        self.stage = placement.stage
        self.key = key
        self.tag = placement.id.owner << 32 | placement.id.attempt
        self.root = root
        self.state = State.QUEUED
        self.alone = placement.alone
        self.prompt_ids = array("I")
        if placement.prompt_ids is None:
            self.prompt_ids.extend(continuation.prompt_ids)
        else:
            self.prompt_ids.frombytes(placement.prompt_ids)
        self.output_ids: list[int] = list(continuation.output_ids)
        """Grows with each token."""
        self.border = len(self.output_ids)
        """Output tokens that were delivered before this attempt."""
        self.base = self.prompt_ids + array("I", self.output_ids)
        """Tokens that the attempt started from."""
        self.limit = min(context_limit, len(self.prompt_ids) + continuation.max_tokens)
        """Tokens in all at which the output ends."""
        self.stop_ids = frozenset(continuation.stop_token_ids)
        self.deadline = placement.received_at + continuation.virtual_deadline_ms / 1000
        """Virtual deadline, seconds: the key of every queue."""
        self.priority = (self.deadline, key)
        self.itl_target_ms = continuation.itl_target_ms
        self.blocks: list[int] = []
        self.look_at = 0
        """Length at which a decoding stream is looked at, whatever it needs; 0: none."""
        self.logprobs: deque[inference.TokenLogprobs] = deque(maxlen=_KEPT_LOGPROBS)
        """Of the last output tokens, where they were asked for."""
        self.stored = 0
        """Leading blocks that are cached and shareable."""
        self.computed = 0
        """Leading tokens whose KV is in the blocks."""
        self.times = Times()
        self.trace: Trace | None = None
        if placement.trace:
            self.trace = Trace(placement.received_at, continuation.waited_ms / 1000)
        wanted = continuation.logprobs if continuation.HasField("logprobs") else None
        self.sample = SampleSpec(
            sampling=continuation.sampling,
            prompt_ids=self.prompt_ids,
            output_ids=self.output_ids,
            logprobs=None if wanted is None else min(wanted, max_logprobs),
        )

    @property
    def length(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def made(self) -> int:
        """Output tokens of this attempt."""
        return len(self.output_ids) - self.border

    @property
    def plain(self) -> bool:
        """Whether nothing but the next token is asked for now."""
        return self.sample.logprobs is None and not self.banned_now()

    def banned_now(self) -> bool:
        """Whether the next token may not end the text."""
        return len(self.output_ids) < self.continuation.min_tokens

    def sample_spec(self) -> SampleSpec:
        """How the next token is drawn."""
        self.sample.banned_ids = tuple(self.stop_ids) if self.banned_now() else ()
        return self.sample

    def ids(self, begin: int, end: int) -> array[int]:
        """Token ids of positions `begin` to `end`."""
        known = len(self.base)
        if end <= known:
            return self.base[begin:end]
        grown = self.output_ids[max(0, begin - known) + self.border : end - known + self.border]
        return self.base[begin:known] + array("I", grown)

    def block_table(self, tokens: int, block_tokens: int) -> npt.NDArray[np.uint32]:
        """Slots of the blocks that hold the first `tokens` tokens."""
        return np.array(self.blocks[: -(-tokens // block_tokens)], dtype=np.uint32)

    def finish_reason(self, token: int) -> inference.FinishReason | None:
        """Whether the output ends with this token, its newest."""
        if token in self.stop_ids and len(self.output_ids) >= self.continuation.min_tokens:
            return inference.FINISH_REASON_STOP
        if self.length >= self.limit:
            return inference.FINISH_REASON_LENGTH
        return None

    def timings(self) -> wire.StageTimings:
        """What its stage took."""
        times = self.times
        received = self.placement.received_at
        queued = times.first_step - received if times.first_step else 0.0
        prefill = times.prefill_end - times.first_step if times.prefill_end else 0.0
        # The last token may be computed again first.
        used = times.first_step or times.decode_step
        waits = bool(times.kv_came and used)
        return wire.StageTimings(
            queue_ms=max(0.0, queued * 1000),
            prefill_ms=max(0.0, prefill * 1000),
            transfer_ms=times.transfer_ms,
            transferred_bytes=times.transferred_bytes,
            cached_tokens=times.cached_tokens,
            pulled_tokens=times.pulled_tokens,
            computed_tokens=times.computed_tokens,
            trace=self.trace.spans() if self.trace is not None else (),
            urgent_start_ms=max(0.0, queued * 1000)
            if times.urgent and times.first_step and not times.pulled_tokens
            else None,
            transfer_tail_ms=times.tail_ms if times.kv_came else None,
            decode_wait_ms=max(0.0, (used - times.kv_came) * 1000) if waits else None,
        )

    @property
    def hands_off(self) -> bool:
        """Whether its stage ends with a hand-off."""
        return self.stage is Stage.PREFILL
