"""KV that goes to another worker, and KV that comes from one (PROTOCOLS 3).

Sending: what becomes full is pinned and announced while later chunks are
computed; the commit carries the last partial block and the first token. The
pins go when the receiver released, or either side aborted.

A running stream that passes to another worker (hand_over.py) is sent in the same way.

Receiving: what is cached here is pinned, room for the rest is reserved, all
or nothing; the pull begins at once and waits for the sender's offer. The
destination is freed only after the node says that no write can come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmesh._router import TransferError
from kvmesh.engine.core.blocks import BlockPool, Hold
from kvmesh.engine.core.sequence import Sequence
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh._router import Committed, PrefixWanted, Reason, ReceiveFailed, TransferNode


@dataclass(slots=True)
class Sending:
    """A transfer from here."""

    transfer_id: bytes
    sequence: Sequence | None
    """None once the stage has ended, and for prefixes that a peer asked for."""
    pinned: list[int] = field(default_factory=list)
    """Announced blocks, in the order of the sequence."""


@dataclass(slots=True)
class Receiving:
    """A transfer to here."""

    transfer_id: bytes
    sequence: Sequence
    held: list[int]
    """Cached blocks before those that come; pinned, or running for a prefix pull."""
    fresh: list[int]
    """Destination and margin; reserved, or running for a prefix pull."""
    is_prefix: bool
    """A prompt's prefix is fetched; else the whole sequence comes."""
    wanted: bool = True
    """False: its attempt has ended, only the blocks are waited for."""


class HandOffs:
    """Transfers of this worker. Used by the engine thread alone."""

    def __init__(self, node: TransferNode, pool: BlockPool, adapters: Mapping[str, str]) -> None:
        """`adapters`: digests by name."""
        self._node = node
        self._pool = pool
        self._adapters = adapters
        self._sending: dict[bytes, Sending] = {}
        self._receiving: dict[bytes, Receiving] = {}
        self._of_sequence: dict[int, bytes] = {}

    @property
    def count(self) -> int:
        """Transfers that are not ended."""
        return len(self._sending) + len(self._receiving)

    # -- sending -----------------------------------------------------------

    def offer(self, sequence: Sequence, transfer_id: bytes, *, grows: bool = False) -> None:
        """Opens a transfer for a prompt; `grows`: for a stream that decodes on.

        Raises TransferError: it was aborted.
        """
        self._node.offer(transfer_id, grows=grows)
        self._sending[transfer_id] = Sending(transfer_id, sequence)
        self._of_sequence[sequence.key] = transfer_id

    def refuse(self, transfer_id: bytes, message: str) -> None:
        """Fails a transfer that somebody pulls, or will pull, from here."""
        try:
            self._node.offer(transfer_id)
        except (TransferError, ValueError):
            # It was aborted before, or runs: then it is not this command's.
            return
        self._node.abort(transfer_id, "failed", message)

    def give_up(self, sequence: Sequence, message: str) -> None:
        """Ends the transfer of a stream from here, if there is one; the stream goes on."""
        transfer_id = self._of_sequence.get(sequence.key, b"")
        if transfer_id in self._sending:
            self._node.abort(transfer_id, "failed", message)
            self.sent(transfer_id)

    def sends(self, transfer_id: bytes) -> Sequence | None:
        """What a transfer from here is for, while that runs."""
        sending = self._sending.get(transfer_id)
        return None if sending is None else sending.sequence

    def has_announced(self, sequence: Sequence) -> bool:
        """Whether a peer may be copying blocks of this prompt."""
        sending = self._sending.get(self._of_sequence.get(sequence.key, b""))
        return sending is not None and bool(sending.pinned)

    def announce(self, sequence: Sequence) -> None:
        """Tells the peer of blocks that became full. Raises TransferError: it is gone."""
        sending = self._sending.get(self._of_sequence.get(sequence.key, b""))
        if sending is None:
            return
        first = len(sending.pinned)
        slots = sequence.blocks[first : sequence.stored]
        if slots:
            self._pool.take(slots, Hold.PINNED)
            sending.pinned.extend(slots)
            self._node.ready(sending.transfer_id, first, slots)

    def commit(
        self,
        sequence: Sequence,
        output_ids: Seq[int],
        logprobs: Seq[inference.TokenLogprobs] = (),
    ) -> None:
        """Says the last word; the receiver goes on. Raises TransferError: it is gone."""
        sending = self._sending[self._of_sequence[sequence.key]]
        self.announce(sequence)
        full, rest = divmod(sequence.computed, self._pool.block_tokens)
        partial = None
        if rest:
            slot = sequence.blocks[full]
            self._pool.take((slot,), Hold.PINNED)
            sending.pinned.append(slot)
            partial = (full, slot)
        self._node.commit(
            sending.transfer_id,
            sequence.computed,
            partial,
            list(output_ids),
            [entry.SerializeToString() for entry in logprobs],
        )
        sending.sequence = None
        del self._of_sequence[sequence.key]

    def knows_adapter_of(self, wanted: PrefixWanted) -> bool:
        """Whether the adapter that a peer names is the one of that name here."""
        digest = wanted.adapter_digest
        return not digest or self._adapters.get(wanted.adapter) == digest

    def offer_prefix(self, wanted: PrefixWanted, slots: list[int]) -> None:
        """Answers a peer that asked for a prefix. Raises TransferError: it is gone."""
        tokens = len(slots) * self._pool.block_tokens
        self._node.offer_prefix(wanted.transfer_id, tokens, slots)
        if slots:
            self._pool.take(slots, Hold.PINNED)
            self._sending[wanted.transfer_id] = Sending(wanted.transfer_id, None, list(slots))

    def sent(self, transfer_id: bytes) -> Sequence | None:
        """A transfer from here is over: unpins. Returns the prompt that needed it still."""
        sending = self._sending.pop(transfer_id, None)
        if sending is None:
            return None
        self._pool.drop(sending.pinned, Hold.PINNED)
        sequence = sending.sequence
        if sequence is not None:
            self._of_sequence.pop(sequence.key, None)
        return sequence

    # -- receiving ---------------------------------------------------------

    def pull(
        self,
        sequence: Sequence,
        hand_off: wire.MeshHandOff,
        held: list[int],
        fresh: list[int],
    ) -> None:
        """Begins to receive a sequence into reserved blocks. Raises TransferError."""
        placement = sequence.placement
        self._node.pull(
            hand_off.transfer_id,
            hand_off.sender_address,
            hand_off.sender_worker,
            hand_off.sender_incarnation,
            len(held) * self._pool.block_tokens,
            fresh,
            placement.traceparent,
            placement.request_id,
        )
        self._note(Receiving(hand_off.transfer_id, sequence, held, fresh, is_prefix=False))

    def pull_prefix(self, sequence: Sequence, source: wire.PrefixSource) -> bool:
        """Begins to fetch a prefix that another worker holds. False: it holds no more."""
        size = self._pool.block_tokens
        first = sequence.stored
        last = min(source.tokens, sequence.length - 1) // size
        if last <= first:
            return False
        transfer_id = os.urandom(16)
        continuation = sequence.continuation
        self._node.pull_prefix(
            transfer_id,
            source.address,
            source.worker,
            source.incarnation,
            first * size,
            sequence.blocks[first:last],
            list(sequence.base[: last * size]),
            continuation.adapter,
            continuation.cache_salt,
            sequence.placement.traceparent,
            sequence.placement.request_id,
            self._adapters.get(continuation.adapter, ""),
        )
        self._note(Receiving(transfer_id, sequence, [], [], is_prefix=True))
        return True

    def _note(self, receiving: Receiving) -> None:
        self._receiving[receiving.transfer_id] = receiving
        if not receiving.is_prefix:
            self._of_sequence[receiving.sequence.key] = receiving.transfer_id

    def received(self, event: Committed | ReceiveFailed) -> Receiving | None:
        """A transfer to here is over."""
        receiving = self._receiving.pop(event.transfer_id, None)
        if receiving is not None and not receiving.is_prefix:
            self._of_sequence.pop(receiving.sequence.key, None)
        return receiving

    # -- either ------------------------------------------------------------

    def abort(self, sequence: Sequence, reason: Reason) -> bool:
        """Ends the transfers of a sequence. True: its blocks are still written to."""
        transfer_id = self._of_sequence.get(sequence.key)
        if transfer_id is not None and transfer_id in self._sending:
            self._node.abort(transfer_id, reason)
            self.sent(transfer_id)
        busy = False
        for receiving in self._receiving.values():
            if receiving.sequence is sequence and receiving.wanted:
                receiving.wanted = False
                busy = True
                # Not known: its last event is on the way already.
                self._node.abort(receiving.transfer_id, reason)
        return busy
