"""Placements in, transfers in and out: what begins and what was moved.

Every Place is answered here. A prompt that the pool cannot hold alone is
refused with the limit; a decode stage gets room for the whole prompt and 64
tokens or nothing (DESIGN 4, KV room), so whoever holds room can go on.
"""

from __future__ import annotations

import itertools
import logging
import os
from array import array
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from kvmesh._router import (
    Committed,
    PrefixWanted,
    Pulled,
    Reached,
    ReceiveFailed,
    SenderAborted,
    SenderReleased,
    TransferError,
)
from kvmesh.engine.contract import Placement, Stage
from kvmesh.engine.core.blocks import Hold
from kvmesh.engine.core.hand_off import Receiving
from kvmesh.engine.core.runner import Sampled
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh._router import TransferEvent
    from kvmesh.engine.core.loop import EngineLoop

_log = logging.getLogger(__name__)

_INTERNAL = 13  # google.rpc.Code


class Admission:
    """Takes placements in and brings transfers together with them."""

    def __init__(self, loop: EngineLoop, settings: CoreSettings, max_logprobs: int) -> None:
        self._loop = loop
        self._settings = settings
        self._max_logprobs = max_logprobs
        self._keys = itertools.count(1)
        pool_tokens = loop.pool.blocks * loop.pool.block_tokens
        self._limit = min(settings.context_length, pool_tokens)

    # -- placements --------------------------------------------------------

    def submit(self, placement: Placement) -> None:
        """Answers a placement; where it is reserved, its stage will end once."""
        loop, continuation = self._loop, placement.continuation
        root = loop.pool.open_root(continuation.adapter, continuation.cache_salt)
        sequence = Sequence(placement, next(self._keys), root, self._limit, self._max_logprobs)
        problem = self._problem(sequence)
        if problem:
            field = "grammar" if continuation.HasField("grammar") else ""
            loop.answers.refused(sequence, wire.REFUSAL_REASON_UNSUPPORTED, problem, field)
            loop.pool.close_root(root)
        elif placement.stage is Stage.DECODE:
            self._receive(sequence)
        else:
            self._enqueue(sequence)

    def refuse_unread(self, placement: Placement) -> None:
        """Answers a placement that could not be taken in."""
        opening = placement.id.opening(placement.stage)
        opening.refused.reason = wire.REFUSAL_REASON_UNSUPPORTED
        opening.refused.message = "the placement cannot be read"
        self._loop.answers.opening(placement.router, opening)

    def _problem(self, sequence: Sequence) -> str:
        """Why this engine can never run a placement; empty: it can."""
        placement, behaviour = sequence.placement, self._settings.behaviour
        if placement.id in self._loop.sequences:
            return "the attempt is here already"
        if not sequence.length:
            return "the prompt is empty"
        if sequence.length >= sequence.limit:
            return f"{sequence.length} tokens leave no room to go on: the limit is {self._limit}"
        vocabulary = self._settings.vocabulary_size
        if vocabulary and np.frombuffer(sequence.base, np.uint32).max() >= vocabulary:
            return f"a token id is not under {vocabulary}"
        if placement.continuation.HasField("grammar"):
            return "grammars are not supported"
        if placement.stage is Stage.WHOLE:
            return ""
        kind = placement.hand_off.WhichOneof("kind") if placement.hand_off else None
        if self._loop.hand_offs is None:
            return "this worker has no transfer node"
        if kind == "mesh":
            return "" if behaviour.streamed_hand_off else "hand-offs here are known on finish only"
        if not behaviour.engine_connector:
            return "a mesh hand-off is needed"
        if placement.stage is Stage.DECODE and kind is None:
            return "the hand-off is not set"
        return ""

    def _refuse(self, sequence: Sequence, reason: wire.RefusalReason, message: str) -> None:
        self._loop.answers.refused(sequence, reason, message)
        self._loop.pool.close_root(sequence.root)

    def _enqueue(self, sequence: Sequence) -> None:
        loop, pool = self._loop, self._loop.pool
        hand_off = sequence.placement.hand_off if sequence.hands_off else None
        if hand_off is not None and hand_off.HasField("mesh") and loop.hand_offs is not None:
            try:
                loop.hand_offs.offer(sequence, hand_off.mesh.transfer_id)
            except (TransferError, ValueError) as error:
                self._refuse(sequence, wire.REFUSAL_REASON_UNKNOWN_TRANSFER, _text(error))
                return
        loop.sequences[sequence.id] = sequence
        loop.queue.add(sequence)
        sequence.times.urgent = loop.queue.waiting[0] is sequence
        held = pool.find(
            sequence.root, sequence.base.tobytes(), (sequence.length - 1) // pool.block_tokens
        )
        # A prompt's room is taken when its first chunk begins, in order.
        loop.answers.reserved(
            sequence, len(held) * pool.block_tokens, loop.queue.reserve_tokens(sequence)
        )

    def _receive(self, sequence: Sequence) -> None:
        """Stage decode: pins what is here, reserves the rest, and pulls."""
        loop, pool = self._loop, self._loop.pool
        hand_off = sequence.placement.hand_off
        if hand_off is None or loop.hand_offs is None:
            raise AssertionError("a decode stage was let in without a hand-off")
        mesh = hand_off.mesh
        if hand_off.HasField("engine"):
            try:
                mesh = wire.MeshHandOff.FromString(hand_off.engine.payload)
            except DecodeError:
                self._refuse(
                    sequence, wire.REFUSAL_REASON_UNSUPPORTED, "the hand-off cannot be read"
                )
                return
        held = pool.find(
            sequence.root, sequence.base.tobytes(), (sequence.length - 1) // pool.block_tokens
        )
        pool.take(held, Hold.PINNED)
        tokens = loop.queue.reserve_tokens(sequence)
        need = pool.blocks_for(tokens) - len(held)
        fresh = None
        if loop.queue.make_room(need, sequence.priority):
            fresh = pool.allocate(need, Hold.RESERVED)
        if fresh is None:
            pool.drop(held, Hold.PINNED)
            self._refuse(
                sequence,
                wire.REFUSAL_REASON_NO_ROOM,
                f"{need} blocks are needed, {pool.available} can be had",
            )
            return
        try:
            loop.hand_offs.pull(sequence, mesh, held, fresh)
        except (TransferError, ValueError) as error:
            pool.drop(held, Hold.PINNED)
            pool.drop(fresh, Hold.RESERVED)
            self._refuse(sequence, wire.REFUSAL_REASON_UNKNOWN_TRANSFER, _text(error))
            return
        sequence.state = State.RECEIVING
        sequence.times.cached_tokens = len(held) * pool.block_tokens
        loop.sequences[sequence.id] = sequence
        loop.answers.reserved(sequence, len(held) * pool.block_tokens, tokens)

    # -- prompts -----------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """A prompt has its blocks: fetch a prefix first, where one is promised."""
        hand_offs, placement = self._loop.hand_offs, sequence.placement
        if hand_offs is None or placement.prefix_from is None:
            return
        if sequence.times.pulled_tokens:
            # It was pulled once and its room was taken: what is gone is computed.
            return
        try:
            if hand_offs.pull_prefix(sequence, placement.prefix_from):
                sequence.state = State.FETCHING
        except (TransferError, ValueError) as error:
            _log.info("prefix not pulled worker=%s: %s", placement.prefix_from.worker, _text(error))

    def announce(self, sequence: Sequence) -> bool:
        """Tells the receiver of new full blocks. False: it is gone, the stage ended."""
        hand_offs = self._loop.hand_offs
        if hand_offs is None:
            return True
        try:
            hand_offs.announce(sequence)
        except TransferError as error:
            self._transfer_failed(sequence, _text(error))
            return False
        return True

    def commit(self, sequence: Sequence, draw: Sampled) -> None:
        """A prompt is computed and its first token drawn: the other worker goes on."""
        logprobs = [] if draw.logprobs is None else [draw.logprobs]
        self._commit(sequence, [draw.token_id], logprobs, wire.HandedOff(tokens_committed=1))

    def finish_prefill(self, sequence: Sequence) -> None:
        """A prompt is computed and decode draws its first token."""
        behaviour, hand_offs = self._settings.behaviour, self._loop.hand_offs
        handed_off = wire.HandedOff()
        hand_off = sequence.placement.hand_off
        if hand_offs is not None and (hand_off is None or not hand_off.HasField("mesh")):
            transfer_id = os.urandom(16)
            hand_offs.offer(sequence, transfer_id)
            mesh = wire.MeshHandOff(
                transfer_id=transfer_id,
                sender_worker=self._settings.worker_id,
                sender_incarnation=self._settings.incarnation,
                sender_address=self._loop.transfer_address,
            )
            handed_off.engine.connector = behaviour.engine_connector
            handed_off.engine.payload = mesh.SerializeToString()
        self._commit(sequence, [], [], handed_off)

    def _commit(
        self,
        sequence: Sequence,
        output_ids: list[int],
        logprobs: list[inference.TokenLogprobs],
        handed_off: wire.HandedOff,
    ) -> None:
        if self._loop.hand_offs is None:
            raise AssertionError("a hand-off was let in without a transfer node")
        try:
            self._loop.hand_offs.commit(sequence, output_ids, logprobs)
        except TransferError as error:
            self._transfer_failed(sequence, _text(error))
            return
        self._loop.end(sequence, handed_off=handed_off)

    def _transfer_failed(self, sequence: Sequence, message: str) -> None:
        failed = wire.TransferFailed(message=message)
        self._loop.end(sequence, "failed", transfer_failed=failed)

    # -- transfers ---------------------------------------------------------

    def transfer_event(self, event: TransferEvent) -> None:
        """What the transfer node has to say."""
        hand_offs = self._loop.hand_offs
        if hand_offs is None:
            return
        match event:
            case PrefixWanted():
                self._answer_prefix(event)
            case Pulled() | Reached():
                self._loop.hand_overs.told(event)
            case SenderReleased():
                hand_offs.sent(event.transfer_id)
            case SenderAborted():
                waiting, why = hand_offs.sent(event.transfer_id), f"{event.reason}: {event.message}"
                if waiting is not None and waiting.state is State.DECODING:
                    self._loop.hand_overs.failed(waiting, why)
                elif waiting is not None:
                    self._transfer_failed(waiting, why)
            case Committed() | ReceiveFailed():
                receiving = hand_offs.received(event)
                if receiving is None:
                    return
                if receiving.is_prefix:
                    self._prefix_here(receiving, event)
                else:
                    self._sequence_here(receiving, event)

    def _answer_prefix(self, wanted: PrefixWanted) -> None:
        hand_offs, pool = self._loop.hand_offs, self._loop.pool
        if hand_offs is None:
            return
        root = pool.open_root(wanted.adapter, wanted.cache_salt)
        ids = array("I", wanted.token_ids)
        slots: list[int] = []
        if hand_offs.knows_adapter_of(wanted):
            slots = pool.find(root, ids.tobytes(), len(ids) // pool.block_tokens)
        else:
            _log.info("prefix not offered adapter=%s: another digest", wanted.adapter)
        try:
            hand_offs.offer_prefix(wanted, slots)
        except TransferError:
            _log.debug("peer asked for a prefix and went worker=%s", wanted.worker_id)
        pool.close_root(root)

    def _prefix_here(self, receiving: Receiving, event: Committed | ReceiveFailed) -> None:
        """A prefix came, or part of it: go on computing behind it."""
        ended = self._ended_at(event)
        sequence, size = receiving.sequence, self._loop.pool.block_tokens
        if not receiving.wanted:
            self._loop.release(sequence)
            return
        before = sequence.computed
        if isinstance(event, Committed):
            verified = event.kv_tokens // size
            sequence.times.transferred_bytes += event.bytes
        else:
            verified = event.verified_blocks
            _log.info("prefix pull ended reason=%s: %s", event.reason, event.message)
        sequence.computed = max(before, min(verified * size, sequence.length - 1) // size * size)
        sequence.times.pulled_tokens += sequence.computed - before
        sequence.times.transfer_ms += event.seconds * 1000
        span = (ended - event.seconds, ended)
        self._trace(sequence, span, sequence.computed - before, "prefix from a worker")
        self._loop.store(sequence)
        sequence.state = State.PREFILLING
        if sequence.hands_off:
            self.announce(sequence)

    def _ended_at(self, event: Committed | ReceiveFailed) -> float:
        """When a transfer ended: the step that ran then may have run on for long."""
        return self._loop.clock.now() - event.waited_seconds

    def _trace(
        self, sequence: Sequence, span: tuple[float, float], tokens: int, cause: str
    ) -> None:
        """A transfer, from its begin to its end."""
        if sequence.trace is not None:
            sequence.trace.add("transfer", *span, tokens, cause)

    def _sequence_here(self, receiving: Receiving, event: Committed | ReceiveFailed) -> None:
        """The KV of a whole sequence came, or it failed."""
        ended = self._ended_at(event)
        loop, pool, sequence = self._loop, self._loop.pool, receiving.sequence
        pool.change(receiving.held, Hold.PINNED, Hold.RUNNING)
        pool.change(receiving.fresh, Hold.RESERVED, Hold.RUNNING)
        sequence.blocks = receiving.held + receiving.fresh
        sequence.stored = len(receiving.held)
        sequence.times.transfer_ms = event.seconds * 1000
        if isinstance(event, ReceiveFailed):
            sequence.computed = min(event.verified_blocks * pool.block_tokens, sequence.length)
        else:
            sequence.times.transferred_bytes = event.bytes
            sequence.times.kv_came = ended
            sequence.times.tail_ms = event.tail_seconds * 1000
            sequence.computed = min(event.kv_tokens, sequence.length)
        came = sequence.computed - len(receiving.held) * pool.block_tokens
        self._trace(sequence, (ended - event.seconds, ended), max(0, came), "hand-off")
        # What was verified stays as prefix, whatever becomes of the attempt.
        loop.store(sequence)
        if not receiving.wanted:
            loop.release(sequence)
        elif isinstance(event, ReceiveFailed):
            self._transfer_failed(sequence, f"{event.reason}: {event.message}")
        else:
            self._go_on(sequence, event)

    def _go_on(self, sequence: Sequence, event: Committed) -> None:
        """Continues what another worker began, from the border on."""
        loop = self._loop
        came = list(event.output_ids)
        expected = sequence.length + max(0, len(came) - 1)
        if not came and event.kv_tokens == sequence.length - 1:
            # A stream that has made nothing since this continuation was written.
            loop.streams.decode(sequence)
            return
        if event.kv_tokens != expected:
            failed = wire.StageFailed(
                code=_INTERNAL,
                reason="TRANSFER_LENGTH",
                message=f"KV of {event.kv_tokens} tokens came, {expected} were expected",
                retryable=True,
            )
            loop.end(sequence, "failed", failed=failed)
            return
        if not came:
            # The sender draws nothing: the last token is computed again here.
            sequence.computed = sequence.length - 1
            sequence.stored = min(sequence.stored, sequence.computed // loop.pool.block_tokens)
            sequence.state = State.PREFILLING
            loop.queue.add(sequence)
            return
        first = len(sequence.output_ids)
        sequence.output_ids.extend(came)
        logprobs = [inference.TokenLogprobs.FromString(entry) for entry in event.logprobs]
        sequence.logprobs.extend(logprobs)
        loop.answers.tokens(sequence, first, came, logprobs)
        reason = sequence.finish_reason(came[-1])
        if reason is not None:
            loop.finish(sequence, reason)
        else:
            loop.streams.decode(sequence)


def _text(error: Exception) -> str:
    return ": ".join(str(part) for part in error.args)
