"""Running streams that pass to another worker with their KV (PROTOCOLS 2, Drain).

::

                  the receiver has all but a block, or its room ends
    hand_over ─▶ passing ────────────────────────────────────────▶ handed_off
                   │ the transfer fails, or nobody came for it
                   └─▶ decodes on as if nothing had happened

A stream that passes decodes on, and nobody beside it waits. What is full is announced at
once, and each block as it becomes full; the receiver says when it has all of it. When one
block and the one that is being filled are all that is left, the stream stops at the border
of a step, and the commit carries the rest: the last partial block and the tokens that the
receiver's continuation does not have.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmesh._router import Pulled, Reached, TransferError
from kvmesh.engine.contract import AttemptId
from kvmesh.engine.core.hand_off import HandOffs
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh.engine.core.loop import EngineLoop

_log = logging.getLogger(__name__)

_LEFT_BLOCKS = 1
"""Full blocks that may be left to move when a stream stops: what fills during the
last round trip. Beside the partial one they take a small part of a step."""


@dataclass(slots=True)
class _Passing:
    """A stream on its way."""

    border: int
    """First output index that the receiver was not given."""
    reached: int | None = None
    """Blocks that the receiver has; None: it has not come."""


class HandOvers:
    """The streams that pass. Used by the engine thread alone."""

    def __init__(self, loop: EngineLoop, settings: CoreSettings) -> None:
        self._loop = loop
        self._settings = settings
        self._passing: dict[int, _Passing] = {}

    # -- from routers ------------------------------------------------------

    def begin(self, attempt: AttemptId, border: int, hand_off: wire.HandOff) -> None:
        """A router wants a stream to pass. One that cannot goes on, and its receiver is told."""
        hand_offs, sequence = self._loop.hand_offs, self._loop.sequences.get(attempt)
        if hand_offs is None or not hand_off.HasField("mesh"):
            return
        transfer_id = hand_off.mesh.transfer_id
        self._loop.streams.batch.sync()
        problem = self._problem(sequence, border)
        if problem or sequence is None:
            _log.info("not handed over generation=%s: %s", attempt.generation.hex(), problem)
            hand_offs.refuse(transfer_id, problem)
            return
        if sequence.key in self._passing and hand_offs.sends(transfer_id) is sequence:
            # Said again by a router whose session broke.
            return
        # A later command stands for an earlier one whose receiver was given up.
        hand_offs.give_up(sequence, "another worker takes the stream over")
        try:
            hand_offs.offer(sequence, transfer_id, grows=True)
        except (TransferError, ValueError) as error:
            self._stays(sequence, _text(error))
            return
        self._passing[sequence.key] = _Passing(border)
        self._advance(sequence)

    def _problem(self, sequence: Sequence | None, border: int) -> str:
        """Why a stream stays; empty: it can go."""
        if not self._settings.behaviour.streamed_hand_off:
            return "a running stream is not handed over here"
        if sequence is None or sequence.state is not State.DECODING:
            return "no such stream decodes here"
        if sequence in self._loop.streams.suspects:
            return "a stream that is suspected of ending workers is not handed over"
        made = len(sequence.output_ids)
        if border > made:
            return f"{made} tokens were made, the receiver was given {border}"
        # Empty where the engine has none.
        if sequence.logprobs and made - border > len(sequence.logprobs):
            return "its log-probabilities are not kept from there on"
        return ""

    # -- from the transfer node --------------------------------------------

    def told(self, event: Pulled | Reached) -> None:
        """The receiver has come, or has all that it was told of."""
        hand_offs = self._loop.hand_offs
        sequence = None if hand_offs is None else hand_offs.sends(event.transfer_id)
        passing = None if sequence is None else self._passing.get(sequence.key)
        if sequence is None or passing is None:
            return
        if isinstance(event, Pulled):
            passing.reached = event.from_token // self._loop.pool.block_tokens
        else:
            passing.reached = event.upto_block
        self._advance(sequence)

    def failed(self, sequence: Sequence, why: str) -> None:
        """The transfer is over before the commit."""
        self._stays(sequence, why)

    # -- from steps --------------------------------------------------------

    def look(self, sequence: Sequence) -> bool:
        """A stream that passes filled a block. False: it left the batch."""
        if sequence.key not in self._passing:
            return True
        self._advance(sequence)
        return sequence.state is State.DECODING

    def ended(self, sequence: Sequence) -> None:
        """A stream has ended, however."""
        self._passing.pop(sequence.key, None)

    # -- the way -----------------------------------------------------------

    def _advance(self, sequence: Sequence) -> None:
        """Announces what is full; stops the stream where little is left."""
        passing, hand_offs = self._passing[sequence.key], self._loop.hand_offs
        if hand_offs is None:
            raise AssertionError("a stream passes without a transfer node")
        self._settle(sequence)
        size = self._loop.pool.block_tokens
        # The receiver has room for so many tokens that it was not given.
        room = self._settings.decode_margin_tokens - 1
        left = room - (len(sequence.output_ids) - passing.border)
        here = passing.reached is not None
        near = passing.reached is not None and (
            sequence.computed // size - passing.reached <= _LEFT_BLOCKS
        )
        try:
            if here and (near or left <= 0):
                self._commit(sequence, passing, hand_offs)
                return
            if left <= 0:
                raise TransferError("failed", "the receiver did not come in time")
            hand_offs.announce(sequence)
        except TransferError as error:
            hand_offs.give_up(sequence, _text(error))
            self._stays(sequence, _text(error))
            return
        self._loop.streams.batch.watch(sequence, min(left, size - sequence.computed % size))

    def _settle(self, sequence: Sequence) -> None:
        """Brings a stream's tokens and full blocks up to date."""
        batch, before = self._loop.streams.batch, sequence.stored
        batch.sync()
        sequence.computed = sequence.length - 1
        self._loop.store(sequence)
        batch.stored(sequence, before)

    def _commit(self, sequence: Sequence, passing: _Passing, hand_offs: HandOffs) -> None:
        ids = sequence.output_ids[passing.border :]
        logprobs = [*sequence.logprobs][-len(ids) :] if ids else []
        hand_offs.commit(sequence, ids, logprobs)
        self._loop.end(sequence, handed_off=wire.HandedOff(tokens_committed=len(ids)))

    def _stays(self, sequence: Sequence, why: str) -> None:
        """A stream goes on here."""
        _log.info(
            "hand-over ended, stream stays generation=%s: %s", sequence.id.generation.hex(), why
        )
        self._passing.pop(sequence.key, None)
        sequence.look_at = 0


def _text(error: Exception) -> str:
    return ": ".join(str(part) for part in error.args)
