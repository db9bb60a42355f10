"""Prompts in order of their virtual deadlines, the room they get, and chunks.

Reading order: a prompt waits here, gets all its blocks or none, and is
computed a chunk at a time. Sizes of chunks are decided in milliseconds
(SCHEDULING 4).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmesh.engine.contract import Stage
from kvmesh.engine.core.blocks import BlockPool, Hold
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.engine.core.step_model import StepLoad, gap_target_ms, predict_ms, tokens_within
from kvmesh.v1 import worker_pb2 as wire

Priority = tuple[float, int]


@dataclass(slots=True)
class Chunk:
    """Next tokens of a prompt."""

    sequence: Sequence
    tokens: int


@dataclass(slots=True)
class Plan:
    """What a step computes."""

    chunks: list[Chunk] = field(default_factory=list)
    decode: bool = False
    """With the streams that decode."""
    alone: Sequence | None = None
    """A suspect that decodes by itself."""

    @property
    def priority(self) -> Priority:
        """That of the most urgent prompt."""
        return min(chunk.sequence.priority for chunk in self.chunks)


class PromptQueue:
    """Prompts that are not computed yet, most urgent first."""

    def __init__(
        self,
        pool: BlockPool,
        settings: CoreSettings,
        begin: Callable[[Sequence], None],
        taken_apart: Callable[[Sequence], bool],
    ) -> None:
        """`begin` is told when a prompt has its blocks; `taken_apart` says
        whether a prompt's room may go to another."""
        self._pool = pool
        self._settings = settings
        self._begin = begin
        self._may_lose_room = taken_apart
        self.waiting: list[Sequence] = []
        self.in_step: set[int] = set()
        """Keys of sequences whose step has begun and not ended."""
        self._no_room: tuple[int, int, int] | None = None
        """(prompt, state of the pool, steps begun) for which room was looked for in vain."""

    def add(self, sequence: Sequence) -> None:
        """Takes a prompt in, behind those as urgent."""
        bisect.insort(self.waiting, sequence, key=_priority)

    def remove(self, sequence: Sequence) -> None:
        """Takes a prompt out, if it is here."""
        at = bisect.bisect_left(self.waiting, sequence.priority, key=_priority)
        if at < len(self.waiting) and self.waiting[at] is sequence:
            del self.waiting[at]

    # -- room --------------------------------------------------------------

    def reserve_tokens(self, sequence: Sequence) -> int:
        """Tokens that a sequence needs room for when it starts."""
        if sequence.stage is Stage.PREFILL:
            return sequence.length
        wanted = sequence.length + self._settings.decode_margin_tokens
        return max(sequence.length, min(wanted, sequence.limit))

    def make_room(self, blocks: int, priority: Priority | None) -> bool:
        """Takes room from started prompts until `blocks` can be had.

        The last in order first, and only those behind `priority`; None: any.
        What they computed stays cached; they wait again.
        """
        if blocks <= self._pool.available:
            return True
        victims, gain = [], 0
        for sequence in reversed(self.waiting):
            if priority is not None and sequence.priority <= priority:
                break
            if self._is_victim(sequence):
                victims.append(sequence)
                gain += len(sequence.blocks)
                if self._pool.available + gain >= blocks:
                    break
        if self._pool.available + gain < blocks:
            return False
        for sequence in victims:
            self._pool.drop(sequence.blocks, Hold.RUNNING)
            sequence.blocks = []
            sequence.stored = sequence.computed = 0
            sequence.state = State.QUEUED
            if sequence.trace is not None:
                sequence.trace.cause = "its KV room went to what is more urgent"
        return blocks <= self._pool.available

    def _is_victim(self, sequence: Sequence) -> bool:
        return (
            sequence.state is State.PREFILLING
            and sequence.key not in self.in_step
            and self._may_lose_room(sequence)
        )

    def _start(self, sequence: Sequence) -> bool:
        """Gives a prompt all the room that it needs, what is cached first."""
        pool = self._pool
        if self._no_room == (sequence.key, pool.changes, len(self.in_step)):
            return False
        held = pool.find(
            sequence.root,
            sequence.base.tobytes(),
            (sequence.length - 1) // pool.block_tokens,
        )
        pool.take(held, Hold.RUNNING)
        need = pool.blocks_for(self.reserve_tokens(sequence)) - len(held)
        fresh = None
        if self.make_room(need, sequence.priority):
            fresh = pool.allocate(need, Hold.RUNNING)
        if fresh is None:
            pool.drop(held, Hold.RUNNING)
            self._no_room = (sequence.key, pool.changes, len(self.in_step))
            return False
        sequence.blocks = held + fresh
        sequence.stored = len(held)
        sequence.computed = len(held) * pool.block_tokens
        sequence.times.cached_tokens = max(sequence.times.cached_tokens, sequence.computed)
        sequence.state = State.PREFILLING
        self._begin(sequence)
        return True

    # -- chunks ------------------------------------------------------------

    def chunks(
        self, model: wire.StepModel, decode: StepLoad, itl_ms: float, above: Priority | None
    ) -> list[Chunk]:
        """Next chunks, beside the streams that decode in the same step.

        `above`: only prompts more urgent than that. At least one block where
        a prompt can run at all.
        """
        if not self.waiting:
            return []
        budget = self._chunk_budget(model, decode, itl_ms)
        chunks: list[Chunk] = []
        may_start = True
        for sequence in list(self.waiting):
            if above is not None and sequence.priority >= above:
                break
            if sequence.key in self.in_step or sequence.state is State.FETCHING:
                continue
            if chunks and (budget.tokens <= 0 or sequence.alone or chunks[0].sequence.alone):
                break
            if sequence.state is State.QUEUED:
                # A prompt that cannot have its room yet is not overtaken by
                # one that takes the room away; what has started goes on.
                may_start = may_start and self._start(sequence)
                if not self._is_started(sequence):
                    continue
            chunks.append(Chunk(sequence, budget.take(sequence, not chunks)))
            if len(chunks) + decode.decode_batch >= self._settings.max_batch:
                break
        return [chunk for chunk in chunks if chunk.tokens]

    @staticmethod
    def _is_started(sequence: Sequence) -> bool:
        return sequence.state is State.PREFILLING

    def _chunk_budget(self, model: wire.StepModel, decode: StepLoad, itl_ms: float) -> _Budget:
        if fixed := self._settings.chunk_tokens:
            return _Budget(model, float("inf"), fixed, self._pool.block_tokens)
        saturating = max(self._pool.block_tokens, model.saturating_chunk)
        budget_ms = float("inf")
        if decode.decode_batch or not self._settings.behaviour.layer_preemption:
            # Nothing can stop such a step.
            budget_ms = self._settings.preemption_target_ms
        if decode.decode_batch:
            step_ms = predict_ms(model, decode)
            budget_ms = min(budget_ms, gap_target_ms(itl_ms, step_ms) - step_ms)
        return _Budget(model, budget_ms, saturating, self._pool.block_tokens)


@dataclass(slots=True)
class _Budget:
    """What is left of a step for prompts."""

    model: wire.StepModel
    ms: float
    tokens: int
    block_tokens: int

    def take(self, sequence: Sequence, at_least_a_block: bool) -> int:
        """Tokens of the next chunk of a prompt; takes them off the budget."""
        start, size = sequence.computed, self.block_tokens
        left = sequence.length - start
        fitting = min(left, self.tokens)
        if self.ms != float("inf"):
            fitting = tokens_within(self.model, self.ms, start, fitting)
        if fitting < left:
            # A chunk ends where a block does: what it made can be shared.
            fitting = max(0, (start + fitting) // size * size - start)
            if not fitting and at_least_a_block:
                fitting = min(left, size - start % size)
        self.tokens -= fitting if fitting else self.tokens
        if self.ms != float("inf"):
            load = StepLoad()
            load.add_chunk(start, fitting)
            self.ms -= predict_ms(self.model, load) - self.model.a_ms
        return fitting


def _priority(sequence: Sequence) -> Priority:
    return sequence.priority
