"""Streams without a pause while things break: clients that ask, read and ask again.

They are the Python client as it ships, so that what it does by itself where a router is lost
(`continue_from` at another one) is part of what is shown.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc
from many_streams import VOCABULARY

import kvmesh

HUNG_S = 120.0
"""A stream that has not ended after this never does."""
STREAMS_A_CLIENT = 8
"""Streams that a client asks for before another client takes its place."""
ASK_AGAIN_S = 0.1
"""Pause of a caller whose request was not accepted."""
_OWN_CONNECTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""As if each client were a process. Else the channels of one process share their connections, and
a new client takes the one that is open: once a router was lost, it would get nobody any more."""


@dataclass(frozen=True)
class Shape:
    """What is asked for. Lengths in tokens, least and longest."""

    streams: int = 24
    """Streams at the same time."""
    head: int = 128
    """Tokens that a prompt has in common with some others; there are `heads` of them."""
    heads: int = 6
    own: tuple[int, int] = (16, 256)
    """Tokens of its own."""
    output: tuple[int, int] = (16, 160)


@dataclass
class Stream:
    """One stream as its client saw it. Times are those of time.monotonic."""

    prompt: list[int]
    asked: int
    began: float
    output: list[int] = field(default_factory=list)
    last: float = 0.0
    """When tokens came last."""
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """From when to when nothing came, between two tokens, where it was long."""
    first_token_s: float = 0.0
    problems: Counter[str] = field(default_factory=Counter)
    """repeated, missing: indices that came again, or were left out. lost: no good end."""
    why: str = ""
    attempts: int = 0
    recomputed_tokens: int = 0

    @property
    def longest_wait_s(self) -> float:
        """The longest time without a token, that before the first one included."""
        return max([self.first_token_s, *(end - begin for begin, end in self.gaps)])


class Traffic:
    """Asks on a thread of its own until it is told to stop."""

    def __init__(
        self,
        targets: Sequence[str],
        shape: Shape,
        seed: int,
        long_gap_s: float,
        ended: Callable[[Stream], None],
    ) -> None:
        """`targets`: the streams take turns with these. `long_gap_s`: gaps from this on are
        kept. `ended`: gets each stream at its end, on this thread."""
        self.asked_again = 0
        """Requests that were lost before they were accepted: their caller asks again."""
        self._targets, self._shape, self._seed = targets, shape, seed
        self._long_gap_s, self._ended = long_gap_s, ended
        self._stopped = False
        self._done: Future[None] = Future()
        rng = random.Random(seed)
        self._heads = [rng.choices(VOCABULARY, k=shape.head) for _ in range(shape.heads)]
        threading.Thread(target=self._run, name="traffic", daemon=True).start()

    def stop(self) -> None:
        """Lets the streams that run end."""
        self._stopped = True

    @property
    def is_over(self) -> bool:
        """Whether all have ended. Raises what went wrong with the traffic itself."""
        if self._done.done():
            self._done.result()
            return True
        return False

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
            self._done.set_result(None)
        except BaseException as error:
            self._done.set_exception(error)

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            targets = itertools.cycle(self._targets)
            for number in range(self._shape.streams):
                group.create_task(self._ask_on(next(targets), number))

    async def _ask_on(self, target: str, number: int) -> None:
        rng = random.Random(f"{self._seed}/{number}")
        while not self._stopped:
            # A connection stays with the router that it found. New clients come all the time,
            # so that a router that is back gets its share.
            async with kvmesh.AsyncClient(target, options=_OWN_CONNECTIONS) as client:
                for _ in range(STREAMS_A_CLIENT):
                    if not self._stopped:
                        await self._ask(client, rng)

    async def _ask(self, client: kvmesh.AsyncClient, rng: random.Random) -> None:
        own = rng.choices(VOCABULARY, k=rng.randint(*self._shape.own))
        prompt = [*(rng.choice(self._heads) if self._heads else []), *own]
        stream = Stream(prompt, rng.randint(*self._shape.output), time.monotonic())
        try:
            async with asyncio.timeout(HUNG_S):
                if not await self._follow(client, stream):
                    self.asked_again += 1
                    await asyncio.sleep(ASK_AGAIN_S)
                    return
        except TimeoutError:
            stream.problems["lost"] += 1
            stream.why = f"no end after {HUNG_S:.0f} s"
        self._ended(stream)

    async def _follow(self, client: kvmesh.AsyncClient, stream: Stream) -> bool:
        """Reads a stream to its end. False: it never began."""
        accepted = finished = False
        try:
            async for event in client.generate(
                token_ids=stream.prompt, max_tokens=stream.asked, ignore_end_of_text=True
            ):
                if isinstance(event, kvmesh.Accepted):
                    accepted = True
                elif isinstance(event, kvmesh.Tokens):
                    self._take(stream, event)
                elif isinstance(event, kvmesh.Finished):
                    finished = True
                    stream.attempts = event.usage.attempts
                    stream.recomputed_tokens = event.usage.recomputed_tokens
        except kvmesh.MeshError as error:
            if not accepted and error.code is grpc.StatusCode.UNAVAILABLE:
                return False
            stream.problems["lost"] += 1
            stream.problems["quarantined"] += error.reason == "QUARANTINED"
            stream.why = f"{error} ({error.reason})"
            return True
        if not finished or len(stream.output) != stream.asked:
            stream.problems["lost"] += 1
            stream.why = f"ended after {len(stream.output)} of {stream.asked} tokens"
        return True

    def _take(self, stream: Stream, event: kvmesh.Tokens) -> None:
        now = time.monotonic()
        if not stream.output:
            stream.first_token_s = now - stream.began
        elif now - stream.last >= self._long_gap_s:
            stream.gaps.append((stream.last, now))
        stream.last = now
        expected = len(stream.output)
        stream.problems["repeated"] += event.first_index < expected
        stream.problems["missing"] += event.first_index > expected
        stream.output.extend(event.ids)
