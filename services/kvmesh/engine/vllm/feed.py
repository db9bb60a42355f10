"""Reads vLLM's cache events from its publisher: a batch a step, numbered."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvmesh.engine.vllm import border
from kvmesh.engine.vllm.cache import VllmCache

_log = logging.getLogger(__name__)

_END = (-1).to_bytes(8, "big", signed=True)
"""Number that ends a replay."""
_REPLAY_TIMEOUT_MS = 2_000


class EventOrder:
    """Batches in the order of their numbers; what is missing is asked for."""

    def __init__(
        self,
        cache: VllmCache,
        decode: Callable[[bytes], Any],
        ask: Callable[[int], Awaitable[Sequence[tuple[int, bytes]]]],
    ) -> None:
        """`ask`: for the batches from a number on, as far as the publisher has them."""
        self._cache = cache
        self._decode = decode
        self._ask = ask

    async def take(self, number: int, payload: bytes) -> None:
        """A batch that came."""
        missing = self._cache.hear(number)
        if missing is None:
            self._cache.apply(self._decode(payload))
        elif missing < number:
            await self._mend(missing, number, payload)

    async def _mend(self, first: int, number: int, payload: bytes) -> None:
        for at, batch in await self._ask(first):
            if at < number and self._cache.hear(at) is None:
                self._cache.apply(self._decode(batch))
        if self._cache.hear(number) is None:
            _log.info("cache events replayed first=%d before=%d", first, number)
        else:
            # The publisher has them no more: what is known is wrong from here on.
            _log.warning("cache events lost first=%d before=%d", first, number)
            self._cache.clear(number)
            self._cache.hear(number)
        self._cache.apply(self._decode(payload))


class EventFeed:
    """Subscribed to one engine's events. To be used in one event loop."""

    def __init__(
        self, events: str, replay: str, cache: VllmCache, told: Callable[[], object]
    ) -> None:
        """Endpoints of the publisher; `told` is called when the cache has changed."""
        self._replay = replay
        self._told = told
        self._order = EventOrder(cache, border.event_decoder(), self._ask)
        self._zmq = border.zmq_names()
        self._context = border.zmq_asyncio().Context()
        self._socket = self._open(self._zmq.SUB, events)
        self._socket.subscribe(b"")

    def _open(self, kind: int, endpoint: str) -> Any:
        socket = self._context.socket(kind)
        socket.setsockopt(self._zmq.LINGER, 0)
        socket.setsockopt(self._zmq.RCVHWM, 0)
        socket.connect(endpoint)
        return socket

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                _, number, payload = await self._socket.recv_multipart()
                await self._order.take(int.from_bytes(number, "big"), payload)
                self._told()
        finally:
            self._socket.close()
            self._context.term()

    async def _ask(self, first: int) -> list[tuple[int, bytes]]:
        """Batches from a number on, as far as the publisher has them."""
        socket = self._open(self._zmq.DEALER, self._replay)
        found: list[tuple[int, bytes]] = []
        try:
            await socket.send_multipart((b"", first.to_bytes(8, "big")))
            while await socket.poll(_REPLAY_TIMEOUT_MS):
                *_, number, payload = await socket.recv_multipart()
                if number == _END:
                    break
                found.append((int.from_bytes(number, "big"), payload))
        finally:
            socket.close()
        return found
