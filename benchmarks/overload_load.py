"""The load of `overload.py`, and what is read from it.

Requests of three classes arrive open-loop, at rates that change from one phase to the next: who is
refused does not slow the arrivals down. Of those that are shed some come back once, when they were
told to. Times are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import alternating

from kvmesh import AsyncClient, Finished, MeshError, Tokens
from kvmesh.client.request import RequestClass

CLASSES: tuple[RequestClass, ...] = get_args(RequestClass)
PROMPT_TOKENS, OUTPUT_TOKENS = 800, 24
VOCABULARY = range(300, 2_000)
SHED = "OVERLOADED"
"""Reason of ErrorInfo (docs/protocols.md)."""
RETURN_SHARE = 0.1
"""Of those that are shed: more would be a load of their own."""
WINDOW_S, SLIDE_S = 5.0, 1.0
"""Recovery is looked for in windows of this length, one beginning this long after the other."""
RECOVERED = 1.3
"""Times the median first token without overload."""
LEAST_ASKED = 5
"""Interactive requests without which a window says nothing."""
RSS_PAUSE_S = 0.1


@dataclass
class Asked:
    """One request as its client saw it."""

    request_class: RequestClass
    sent: float
    first: float | None = None
    """When its first token came."""
    finished: bool = False
    shed: float | None = None
    """When it was refused, or given up, for overload."""
    told_s: float | None = None
    """When it was to come back, from then on."""
    failed: str = ""
    """Any other error."""
    returns: bool = False
    """It was shed before, and comes when it was told to."""

    @property
    def ttft_ms(self) -> float | None:
        """From sending to the first token; None: it has none."""
        return None if self.first is None else 1e3 * (self.first - self.sent)


Rates = Mapping[RequestClass, float]
"""Requests a second."""


@dataclass(frozen=True)
class Phase:
    """A time of one load."""

    seconds: float
    rates: Rates


def arrivals(phases: Sequence[Phase], rng: random.Random) -> list[tuple[float, RequestClass]]:
    """Poisson arrivals of all classes, seconds since the begin of the first phase."""
    found: list[tuple[float, RequestClass]] = []
    begin = 0.0
    for phase in phases:
        for name, rate in phase.rates.items():
            at = begin + rng.expovariate(rate)
            while at < begin + phase.seconds:
                found.append((at, name))
                at += rng.expovariate(rate)
        begin += phase.seconds
    return sorted(found)


def times_over(capacity: float, rates: Rates, load: float, keep: Sequence[RequestClass]) -> Rates:
    """Rates that come to `load` times the capacity; those of the classes in `keep` stay."""
    kept = sum(rates[name] for name in keep)
    factor = (load * capacity - kept) / (sum(rates.values()) - kept)
    return {name: rate if name in keep else rate * factor for name, rate in rates.items()}


@dataclass
class Load:
    """Asks one router."""

    client: AsyncClient
    rng: random.Random
    asked: list[Asked] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    """How much later than it was due each request was sent."""
    rss: list[tuple[float, float]] = field(default_factory=list)
    """Of the router: when, MiB."""

    async def run(self, phases: Sequence[Phase], router: int) -> float:
        """Brings all phases, and waits for all that was asked. Returns when it began."""
        began = time.perf_counter()
        ends = began + sum(phase.seconds for phase in phases)
        watch = asyncio.create_task(self._watch(router))
        try:
            async with asyncio.TaskGroup() as group:
                for at, request_class in arrivals(phases, self.rng):
                    await asyncio.sleep(began + at - time.perf_counter())
                    self.late_s.append(time.perf_counter() - began - at)
                    group.create_task(self._one(request_class, ends))
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        return began

    async def saturate(self, streams: int, seconds: float, shares: Rates) -> float:
        """Requests that end a second while so many are always under way: the capacity. The first
        third of the time is no part of it."""
        until = time.perf_counter() + seconds
        begin = until - seconds * 2 / 3
        ended: list[float] = []
        names, weights = list(shares), list(shares.values())

        async def ask() -> None:
            while time.perf_counter() < until:
                (name,) = self.rng.choices(names, weights)
                asked = await self._ask(name)
                if asked.finished:
                    ended.append(time.perf_counter())
                elif asked.told_s is None:
                    raise SystemExit(f"it failed: {asked}")
                else:
                    await asyncio.sleep(asked.told_s)

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(ask())
        return sum(begin <= at < until for at in ended) / (until - begin)

    async def _one(self, request_class: RequestClass, ends: float) -> None:
        asked = await self._ask(request_class)
        self.asked.append(asked)
        if asked.told_s is None or self.rng.random() >= RETURN_SHARE:
            return
        # One that is to come later than anybody looks says nothing.
        if time.perf_counter() + asked.told_s < ends:
            await asyncio.sleep(asked.told_s)
            self.asked.append(await self._ask(request_class, returns=True))

    async def _ask(self, request_class: RequestClass, *, returns: bool = False) -> Asked:
        prompt = self.rng.choices(VOCABULARY, k=PROMPT_TOKENS)
        asked = Asked(request_class, time.perf_counter(), returns=returns)
        events = self.client.generate(
            token_ids=prompt, max_tokens=OUTPUT_TOKENS, ignore_end_of_text=True, text=False,
            request_class=request_class,
        )  # fmt: skip
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Tokens) and asked.first is None:
                        asked.first = time.perf_counter()
                    elif isinstance(event, Finished):
                        asked.finished = True
        except MeshError as error:
            if error.reason == SHED:
                asked.shed, asked.told_s = time.perf_counter(), error.retry_after_s
            else:
                asked.failed = str(error)
        return asked

    async def _watch(self, router: int) -> None:
        while True:
            self.rss.append((time.perf_counter(), rss_mib(router)))
            await asyncio.sleep(RSS_PAUSE_S)


def rss_mib(pid: int) -> float:
    """Memory of a process that is resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the router has ended")


# -- what is read from it ----------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What became of the requests of a class that were sent in a time."""

    request_class: RequestClass
    asked: int
    answered: int
    shed: int
    failed: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    refusal_p95_ms: float | None
    """Until those that were shed heard so."""


def row(asked: Sequence[Asked], name: RequestClass, begin: float, end: float) -> Row:
    """Of a class, without those that come back."""
    of = [one for one in asked
          if one.request_class == name and begin <= one.sent < end and not one.returns]  # fmt: skip
    ttft = [one.ttft_ms for one in of if one.ttft_ms is not None]
    heard = [1e3 * (one.shed - one.sent) for one in of if one.shed is not None]
    return Row(
        name, len(of), sum(one.finished for one in of), len(heard),
        sum(bool(one.failed) for one in of),
        quantile(ttft, 0.5), quantile(ttft, 0.95), quantile(heard, 0.95),
    )  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that this share of them does not exceed; None of none."""
    return alternating.quantile(values, share) if values else None


def honesty(asked: Sequence[Asked], begin: float, end: float) -> tuple[int, int]:
    """Of those that came back in a time: how many, and how many were answered."""
    came = [one for one in asked if one.returns and begin <= one.sent < end]
    return len(came), sum(one.finished for one in came)


def rss_ratio(samples: Sequence[tuple[float, float]], overload: float) -> float:
    """The most that was resident from the overload's begin on over the most before it."""
    before = max(mib for at, mib in samples if at < overload)
    return max(mib for at, mib in samples if at >= overload) / before


def recovery_s(asked: Sequence[Asked], calm_p50_ms: float, over: float, end: float) -> float | None:
    """From the overload's end to the begin of the first window in which nobody was shed, and all
    interactive requests were answered, half of them in `RECOVERED` times the calm median."""
    begin = over
    while begin + WINDOW_S <= end:
        if _is_calm(asked, calm_p50_ms, begin, begin + WINDOW_S):
            return begin - over
        begin += SLIDE_S
    return None


def _is_calm(asked: Sequence[Asked], calm_p50_ms: float, begin: float, end: float) -> bool:
    if any(one.shed is not None and begin <= one.shed < end for one in asked):
        return False
    ttft = [
        one.ttft_ms
        for one in asked
        if one.request_class == "interactive" and begin <= one.sent < end
    ]
    answered = [each for each in ttft if each is not None]
    if len(ttft) < LEAST_ASKED or len(answered) < len(ttft):
        return False
    return statistics.median(answered) <= RECOVERED * calm_p50_ms
