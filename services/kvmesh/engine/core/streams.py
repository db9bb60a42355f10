"""Streams that decode: their tokens, their room, and who gives way.

A full pool takes room from what matters least (DESIGN 4, KV room): cached
prefixes that nobody uses, then prompts that have started, the last in order
first, then running streams, of the lowest class the youngest. One stream
always stays, so somebody always advances.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmesh.engine.core.blocks import BlockPool, Hold
from kvmesh.engine.core.decode_rows import DecodeBatch
from kvmesh.engine.core.runner import Sampled
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh.engine.core.loop import EngineLoop

_GROWTH_BLOCKS = 8
"""Blocks that a stream gets at once while a quarter of the pool can be had."""

_CLASS_ORDER = {
    inference.REQUEST_CLASS_INTERACTIVE: 0,
    inference.REQUEST_CLASS_STANDARD: 1,
    inference.REQUEST_CLASS_UNSPECIFIED: 1,
    inference.REQUEST_CLASS_BATCH: 2,
}


class Streams:
    """The decoding streams of an engine. Used by the engine thread alone."""

    def __init__(self, loop: EngineLoop, pool: BlockPool, settings: CoreSettings) -> None:
        self._loop = loop
        self._settings = settings
        self.batch = DecodeBatch(pool.block_tokens)
        self.suspects: list[Sequence] = []
        """Streams that share their steps with nobody (Place.alone)."""
        self.stalled: list[Sequence] = []
        """Streams that wait for a block until transfers end."""
        self.came: list[Sequence] = []
        """Streams whose KV came from another worker, before their first step."""
        self.decoded_at = float("-inf")
        """When the last step with these streams ended."""

    def take_tokens(self, tokens: bytes, draws: Seq[Sampled | None]) -> None:
        """The decoding streams' new tokens."""
        self.take_due(tokens, draws, self.batch.advance(tokens))

    def take_due(self, tokens: bytes, draws: Seq[Sampled | None], due: Seq[int]) -> None:
        """As `take_tokens`, where it is known which rows need a look."""
        loop = self._loop
        batch = self.batch
        # A stream that ends leaves the batch; rows count as they were.
        sequences = batch.sequences
        batch.tell(tokens)
        for router, answer in batch.answers.items():
            if answer.tokens is not None:
                loop.answers.columns(router, replace(answer.tokens))
        if draws:
            self._tell_logprobs(sequences, draws)
        loop.shares.stepped()
        if due:
            stays = [self._look(row, sequences[row]) for row in sorted(set(due))]
            if not all(stays):
                loop.count_shares()
            if batch.steady:
                self._grow_ahead(sequences)

    def _tell_logprobs(self, sequences: list[Sequence], draws: Seq[Sampled | None]) -> None:
        places: dict[str, int] = {}
        for sequence, draw in zip(sequences, draws, strict=True):
            place = places[sequence.router] = places.get(sequence.router, -1) + 1
            if draw is not None and draw.logprobs is not None:
                sequence.logprobs.append(draw.logprobs)
                self._loop.answers.logprobs(sequence, place, draw.logprobs)

    def _look(self, row: int, sequence: Sequence) -> bool:
        """A stream that filled its blocks or may have ended. False: it left the batch."""
        loop = self._loop
        if sequence.state is State.ENDED:
            return False
        reason = sequence.finish_reason(sequence.output_ids[-1])
        if reason is not None:
            loop.finish(sequence, reason)
            return False
        sequence.computed = sequence.length - 1
        if 0 < sequence.look_at <= sequence.length and not loop.hand_overs.look(sequence):
            return False
        if sequence.computed < len(sequence.blocks) * loop.pool.block_tokens:
            return True
        changed = sequence.stored
        loop.store(sequence)
        if not self._has_room(sequence):
            self.batch.leave((sequence,))
            return False
        self.batch.grown(row, sequence, changed)
        return True

    def _grow_ahead(self, sequences: list[Sequence]) -> None:
        """Room for streams that soon fill theirs, where there is plenty.

        Each fills its blocks at another step: looked at one by one, they would
        let hardly a step go on without a look. Nobody gives way for it.
        """
        loop, pool, batch = self._loop, self._loop.pool, self.batch
        if not self._plenty:
            return
        for row in batch.fill_soon():
            sequence = sequences[row]
            sequence.computed = sequence.length - 1
            changed = sequence.stored
            loop.store(sequence)
            # One that ends before needs none.
            if self._plenty and sequence.limit > len(sequence.blocks) * pool.block_tokens + 1:
                sequence.blocks += pool.allocate(_GROWTH_BLOCKS, Hold.RUNNING) or ()
            batch.grown(row, sequence, changed)

    def take_suspect(self, sequence: Sequence, draw: Sampled) -> None:
        """The new token of a suspect that decoded by itself."""
        loop = self._loop
        sequence.computed += 1
        if sequence.computed % loop.pool.block_tokens == 0:
            loop.store(sequence)
        self.suspects.remove(sequence)
        reason = loop.take_draw(sequence, draw)
        if reason is not None:
            loop.finish(sequence, reason)
        else:
            self.decode(sequence)

    def decode(self, sequence: Sequence) -> None:
        """A stream whose newest token is to be computed joins the others."""
        loop = self._loop
        sequence.state = State.DECODING
        if sequence.trace is not None and sequence.trace.decoding_since is None:
            sequence.trace.decoding_since = loop.clock.now()
            if sequence.times.kv_came and not sequence.times.first_step:
                sequence.trace.kv_came = sequence.times.kv_came
        sequence.computed = sequence.length - 1
        loop.store(sequence)
        if not self._has_room(sequence):
            return
        if sequence.alone and sequence.made < self._settings.alone_tokens:
            self.suspects.append(sequence)
        else:
            if sequence.times.kv_came and not sequence.times.decode_step:
                self.came.append(sequence)
            if not len(self.batch):
                # Its second token is due at once.
                self.decoded_at = float("-inf")
            self.batch.join(sequence)

    def step_begins(self, now: float, suspect: Sequence | None = None) -> None:
        """The first step of those whose KV came, or of a suspect."""
        first = self.came
        if suspect is None:
            self.came = []
        else:
            times = suspect.times
            first = [suspect] if times.kv_came and not times.decode_step else []
        for sequence in first:
            times, trace = sequence.times, sequence.trace
            times.decode_step = now
            if trace is not None and not times.first_step:
                tokens, cause = self._loop.steps.log.beside(times.kv_came)
                trace.add("decode_wait", times.kv_came, now, tokens, cause)

    # -- room of running streams -------------------------------------------

    @property
    def _plenty(self) -> bool:
        """Whether streams may take more blocks than they need now."""
        pool = self._loop.pool
        # In a small pool a quarter is less than what they take: prompts would give way.
        return pool.available > max(pool.blocks // 4, _GROWTH_BLOCKS)

    def _has_room(self, sequence: Sequence) -> bool:
        """Sees that the next token has a block. False: the stream cannot go on now."""
        loop = self._loop
        if (sequence.length - 1) // loop.pool.block_tokens < len(sequence.blocks):
            return True
        # Some at once where there is plenty: a stream asks less often.
        wanted = _GROWTH_BLOCKS if self._plenty else 1
        while True:
            if loop.queue.make_room(wanted, None):
                fresh = loop.pool.allocate(wanted, Hold.RUNNING)
                if fresh is not None:
                    sequence.blocks += fresh
                    return True
            wanted = 1
            victim = self._stream_victim(sequence)
            if victim is None:
                # The most important stream waits for transfers to end.
                self.stalled.append(sequence)
                return False
            self.give_back(victim, "the KV pool is full")
            if victim is sequence:
                return False

    def _stream_victim(self, asking: Sequence) -> Sequence | None:
        """Of the running streams, the youngest of the lowest class; one always stays."""
        loop = self._loop
        streams = [s for s in loop.sequences.values() if s.state is State.DECODING]
        if len(streams) < 2:
            return None
        return max(
            streams,
            key=lambda s: (
                _CLASS_ORDER[s.continuation.request_class],
                s.placement.received_at,
                s.key,
            ),
        )

    def retry_stalled(self) -> None:
        """Looks for room again for streams that wait for it."""
        stalled, self.stalled = self.stalled, []
        for sequence in stalled:
            if sequence.state is State.DECODING:
                self.decode(sequence)

    def give_back(self, sequence: Sequence, message: str) -> None:
        """Returns a running stream to its router; not a failure."""
        loop = self._loop
        returned = wire.Returned(reason=wire.REFUSAL_REASON_NO_ROOM, message=message)
        loop.end(sequence, returned=returned)
