"""A client with many calls on one connection, each of which it leaves at a random point."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from raw_http2 import DATA, Frame, RawHttp2

from kvmesh.v1 import inference_pb2

POINTS = ("unanswered", "accepted", "first token", "more tokens")
"""How far a call had come when it was left. One token: prefill's, and decode has not said its
own, so that the hand-off is under way or has just ended."""
PATIENCE = 400
"""Most frames of the connection that a call waits for."""
AT_ONCE = 64
"""Calls that are open at a time."""


@dataclass
class _Call:
    """What came of a call."""

    data: bytearray = field(default_factory=bytearray)
    messages: int = 0
    tokens: int = 0

    def take(self, payload: bytes) -> None:
        """Counts whole messages and tokens."""
        self.data += payload
        while len(self.data) >= 5 + (length := int.from_bytes(self.data[1:5], "big")):
            message = inference_pb2.GenerateResponse.FromString(bytes(self.data[5 : 5 + length]))
            self.messages += 1
            self.tokens += len(message.tokens.ids)
            del self.data[: 5 + length]

    @property
    def point(self) -> str:
        """How far it has come."""
        if self.tokens:
            return "first token" if self.tokens == 1 else "more tokens"
        return "accepted" if self.messages else "unanswered"


class Crowd(RawHttp2):
    """One connection."""

    def __init__(self, address: str, rng: random.Random) -> None:
        super().__init__(address)
        self.left: Counter[str] = Counter()
        """Calls that were left, by how far they had come; "ended": before that."""
        self._rng = rng
        self._calls: dict[int, _Call] = {}
        self._frames = 0
        # When each is left: by the number of frames that have come by then.
        self._due: list[tuple[int, int]] = []

    def frame(self) -> Frame:
        """As that of a connection, which also calls this while a call waits to be sent."""
        frame = super().frame()
        self._frames += 1
        if (call := self._calls.get(frame.stream)) is not None:
            if frame.kind == DATA:
                call.take(frame.payload)
            if frame.ends_stream:
                del self._calls[frame.stream]
                self.left["ended"] += 1
        return frame

    def come_and_go(self, bodies: Iterable[bytes]) -> None:
        """Makes a call of each, and leaves calls while they come. Some are left when it ends."""
        for body in bodies:
            stream = self.call(body)
            self._calls[stream] = _Call()
            # One in eight goes before anything can have come.
            patience = self._rng.randrange(PATIENCE) if self._rng.randrange(8) else 0
            heapq.heappush(self._due, (self._frames + patience, stream))
            self._leave_due()
            while len(self._calls) >= AT_ONCE:
                self.frame()
                self._leave_due()

    def leave_all(self, *, vanish: bool) -> None:
        """Nobody is left: each call is reset, or the socket ends without a word."""
        for stream in list(self._calls):
            self._leave(stream, silently=vanish)
        if vanish:
            self.vanish()

    def _leave_due(self) -> None:
        while self._due and self._due[0][0] <= self._frames:
            _, stream = heapq.heappop(self._due)
            if stream in self._calls:
                self._leave(stream)

    def _leave(self, stream: int, *, silently: bool = False) -> None:
        self.left[self._calls.pop(stream).point] += 1
        if not silently:
            self.reset(stream)
