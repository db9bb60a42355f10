"""Work by router session, as load reports tell it."""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.engine.contract import LoadShare
from kvmesh.engine.core.sequence import Sequence, State


class Shares:
    """Counts, made anew when something joins or leaves; a decode step only adds.

    Written by the engine thread; `read` may be called from any thread.
    """

    def __init__(self) -> None:
        self._shares: dict[str, LoadShare] = {}

    def count(self, sequences: Iterable[Sequence]) -> None:
        """Counts all there is."""
        shares: dict[str, LoadShare] = {}
        for sequence in sequences:
            share = shares.get(sequence.router)
            if share is None:
                share = shares[sequence.router] = LoadShare()
            of_class = share.of_class(sequence.continuation.request_class)
            left = sequence.length - sequence.computed
            match sequence.state:
                case State.QUEUED | State.FETCHING:
                    share.queued += 1
                    share.queued_prefill_tokens += left
                    of_class.waiting += 1
                    of_class.waiting_tokens += left
                case State.PREFILLING:
                    share.running_prefill_tokens += left
                    of_class.waiting += 1
                    of_class.waiting_tokens += left
                case State.DECODING:
                    share.decoding += 1
                    share.decode_context += sequence.length
                    of_class.decoding += 1
                case State.RECEIVING:
                    share.receiving += 1
                    of_class.decoding += 1
        self._shares = shares

    def stepped(self, steps: int = 1) -> None:
        """Each decoding stream has so many tokens more."""
        for share in self._shares.values():
            share.decode_context += steps * share.decoding

    def read(self) -> dict[str, LoadShare]:
        """The newest counts. Not to be changed by the reader."""
        return self._shares
