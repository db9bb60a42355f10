"""The load of `isolation.py`: people who chat, and documents that keep a machine busy.

A phase is one stretch of time at one router: chat turns alone, or with documents beside them.
Turns arrive open-loop; who waits for an answer does not slow the arrivals down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from kvmesh import AsyncClient, Finished, MeshError, Tokens
from kvmesh.client.request import RequestClass

TURNS_PER_S = 0.3
NEW_TOKENS = 60
ANSWER_TOKENS = 64
CONVERSATIONS = 4
TURNS_OF_A_CONVERSATION = 5
DOCUMENT_ANSWER_TOKENS = 8
# Turns that have arrived are waited for after the end of a phase, at most so long.
DRAIN_S = 90.0
VOCABULARY = range(1_000, 40_000)


@dataclass
class Answer:
    """One request as its client saw it; times are seconds since the begin of its phase."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    """When each output token came."""
    ended: float | None = None
    """None: it failed, or was left when its phase was over."""
    error: str = ""
    prompt: int = 0
    cached: int = 0
    pulled: int = 0
    computed: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    trace: list[tuple[str, float, float, int, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list, repr=False)

    @property
    def ttft_ms(self) -> float:
        """From sending to the first token."""
        return 1e3 * (self.tokens[0] - self.sent)

    @property
    def gaps_ms(self) -> list[float]:
        """Between each two tokens."""
        return [1e3 * (after - before) for before, after in pairwise(self.tokens)]

    def plain(self) -> dict[str, Any]:
        """For the raw data."""
        raw = asdict(self)
        del raw["ids"]
        raw["tokens"] = [round(at, 5) for at in self.tokens]
        return raw


@dataclass
class Phase:
    """What a phase brought."""

    began_s: float
    """When, on `time.perf_counter`."""
    seconds: float
    documents_in_flight: int
    turns: list[Answer] = field(default_factory=list)
    documents: list[Answer] = field(default_factory=list)
    extra_conversations: int = 0
    """Turns that found all four conversations answering."""
    took_s: float = 0.0
    """With the answers that were under way at its end."""
    others_share: float = 0.0
    """Share of the machine that others used."""
    repeats: int = 0
    """Runs of this phase that were thrown away since others used too much."""
    roles: dict[str, str] = field(default_factory=dict)
    """Of the workers, at its end."""
    flips: list[str] | None = None
    """What a planner made of it and of the runs thrown away, in order; None: there was none."""

    @property
    def answered(self) -> list[Answer]:
        """Turns that got a token at all."""
        return [turn for turn in self.turns if turn.tokens]

    @property
    def read(self) -> list[Answer]:
        """Documents that were answered to the end."""
        return [document for document in self.documents if document.ended is not None]

    @property
    def document_s(self) -> list[float]:
        """How long each took; of one that was cut off, how long it had by then."""
        ends = ((one, one.ended if one.ended is not None else self.took_s)
                for one in self.documents)  # fmt: skip
        return [ended - one.sent for one, ended in ends]

    @property
    def documents_per_s(self) -> float:
        """Up to the end of the last one that was answered: no part of one counts."""
        ends = [document.ended for document in self.read if document.ended is not None]
        return len(ends) / max(ends) if ends else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens computed and output tokens, of what was answered to the end."""
        whole = [answer for answer in self.turns + self.documents if answer.ended is not None]
        return sum(one.computed + len(one.tokens) for one in whole) / self.took_s

    def plain(self) -> dict[str, Any]:
        """For the raw data."""
        return {
            **{name: getattr(self, name) for name in (
                "seconds", "took_s", "documents_in_flight", "extra_conversations",
                "others_share", "repeats", "roles", "flips",
            )},
            "turns": [turn.plain() for turn in self.turns],
            "documents": [document.plain() for document in self.documents],
        }  # fmt: skip


def arrivals(seconds: float, seed: str, again_after_s: float = float("inf")) -> list[float]:
    """Poisson arrivals of a phase, seconds since its begin: the same for the same seed.

    After `again_after_s` the same ones come again. So a storm has those of the phase alone before
    it: how many answer at a time is then the same, and a difference is the storm's.
    """
    rng = random.Random(seed)
    found, at = [], rng.expovariate(TURNS_PER_S)
    while at < min(seconds, again_after_s):
        found.append(at)
        at += rng.expovariate(TURNS_PER_S)
    if again_after_s < seconds:
        times = int(seconds / again_after_s) + 1
        repeated = (again_after_s * number + at for number in range(times) for at in found)
        found = [at for at in repeated if at < seconds]
    return found


@dataclass(eq=False)
class _Conversation:
    """What was said so far, and since when nobody has said more."""

    name: str
    history: list[int] = field(default_factory=list)
    turns: int = 0
    idle_since: float = 0.0
    answering: bool = False


class _Chat:
    """Four conversations, and those opened beside them."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._count = 0
        self.extra = 0
        self._open = [self._fresh() for _ in range(CONVERSATIONS)]

    def _fresh(self) -> _Conversation:
        self._count += 1
        return _Conversation(f"{self._seed}/{self._count}")

    def take(self) -> _Conversation:
        """Who speaks next: the longest idle, or somebody new."""
        idle = [one for one in self._open if not one.answering]
        if idle:
            chosen = min(idle, key=lambda one: one.idle_since)
        else:
            self.extra += 1
            chosen = self._fresh()
        chosen.answering = True
        return chosen

    def answered(self, one: _Conversation, answer: Answer, now: float) -> None:
        """A turn is over; a conversation that ended makes place for a fresh one."""
        one.answering, one.idle_since = False, now
        one.history += answer.ids
        one.turns += 1
        if one in self._open and (one.turns >= TURNS_OF_A_CONVERSATION or answer.ended is None):
            fresh = self._fresh()
            fresh.idle_since = now
            self._open[self._open.index(one)] = fresh


class PhaseRun:
    """Runs one phase against one router."""

    def __init__(
        self, client: AsyncClient, seconds: float, seed: str, turns: Sequence[float],
        documents: int, document_tokens: int, trace: bool = False,
    ) -> None:  # fmt: skip
        """`turns`: when they arrive. `documents`: how many are in flight at any time; 0: chat
        alone."""
        self._client = client
        self._turns = turns
        # A phase that is repeated finds nothing of its first run in a cache.
        self._words = os.urandom(8).hex()
        self._document_tokens = document_tokens
        self._trace = trace
        self._chat = _Chat(seed)
        self.phase = Phase(0.0, seconds, documents)

    async def run(self) -> Phase:
        """Runs it to its end; answers under way are waited for, documents are not."""
        phase = self.phase
        phase.began_s = time.perf_counter()
        reading = [
            asyncio.create_task(self._read_documents(number))
            for number in range(phase.documents_in_flight)
        ]
        try:
            turns = []
            for number, at in enumerate(self._turns):
                await asyncio.sleep(max(0.0, at - self._now()))
                turns.append(asyncio.create_task(self._turn(number)))
            await asyncio.sleep(max(0.0, phase.seconds - self._now()))
            if turns:
                _, late = await asyncio.wait(turns, timeout=DRAIN_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*turns, return_exceptions=True)
            phase.took_s = self._now()
        finally:
            for task in reading:
                task.cancel()
            for result in await asyncio.gather(*reading, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        phase.extra_conversations = self._chat.extra
        return phase

    def _now(self) -> float:
        return time.perf_counter() - self.phase.began_s

    async def _turn(self, number: int) -> None:
        conversation = self._chat.take()
        words = random.Random(f"{self._words}/turn/{number}")
        conversation.history += words.choices(VOCABULARY, k=NEW_TOKENS)
        answer = Answer(self._now())
        self.phase.turns.append(answer)
        await self._ask(answer, conversation.history, ANSWER_TOKENS, "interactive",
                        conversation.name)  # fmt: skip
        self._chat.answered(conversation, answer, self._now())

    async def _read_documents(self, reader: int) -> None:
        words = random.Random(f"{self._words}/document/{reader}")
        while True:
            ids = words.sample(VOCABULARY, k=self._document_tokens)
            document = Answer(self._now())
            self.phase.documents.append(document)
            await self._ask(document, ids, DOCUMENT_ANSWER_TOKENS, "standard", "")
            if document.error:
                # Not at once again: a mesh that refuses is not to be hammered.
                await asyncio.sleep(1.0)

    async def _ask(
        self, answer: Answer, ids: Sequence[int], count: int, request_class: RequestClass, name: str
    ) -> None:
        answer.prompt = len(ids)
        events = self._client.generate(
            token_ids=ids, max_tokens=count, temperature=0.0, ignore_end_of_text=True,
            text=False, request_class=request_class, conversation_id=name, trace=self._trace,
        )  # fmt: skip
        try:
            async with _closing(events):
                async for event in events:
                    if isinstance(event, Tokens):
                        answer.tokens += [self._now()] * len(event.ids)
                        answer.ids += event.ids
                    elif isinstance(event, Finished):
                        self._finish(answer, event)
        except MeshError as error:
            answer.error = str(error)

    def _finish(self, answer: Answer, event: Finished) -> None:
        answer.ended = self._now()
        usage, timings = event.usage, event.timings
        answer.cached, answer.pulled = usage.cached_tokens, usage.pulled_tokens
        answer.computed = usage.computed_tokens
        answer.timings = {
            name: round(getattr(timings, name), 2)
            for name in ("queue_ms", "worker_queue_ms", "prefill_ms", "transfer_ms",
                         "transfer_tail_ms", "first_token_ms", "longest_gap_ms")
        }  # fmt: skip
        answer.trace = [
            (span.name, round(span.start_ms, 2), round(span.duration_ms, 2), span.tokens,
             span.cause) for span in event.trace
        ]  # fmt: skip


@contextlib.asynccontextmanager
async def _closing(events: AsyncIterator[Any]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def documents_alone(client: AsyncClient, tokens: int, count: int) -> list[Answer]:
    """Documents one after the other, with nothing beside them."""
    run = PhaseRun(client, 0.0, "alone", (), 0, tokens)
    run.phase.began_s = time.perf_counter()
    words = random.Random()
    for _ in range(count):
        document = Answer(run._now())
        run.phase.documents.append(document)
        ids = words.sample(VOCABULARY, k=tokens)
        await run._ask(document, ids, DOCUMENT_ANSWER_TOKENS, "standard", "")
        if document.ended is None:
            raise SystemExit(f"a document alone was not answered: {document.error}")
    return run.phase.documents
