"""Many streams at once beside a test that breaks things."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import kvmesh
from kvmesh.engine.sim.content import reference_tokens
from kvmesh.engine.sim.settings import SimSettings
from kvmesh.engine.sim.vocabulary import end_of_text_ids

_SIM = SimSettings()
VOCABULARY = range(max(end_of_text_ids()) + 1, _SIM.vocabulary)
_WORDS = _SIM.block_bytes // _SIM.block_tokens // 8


def prompts(count: int, tokens: int = 100, seed: int = 1) -> list[list[int]]:
    """Prompts that share nothing."""
    rng = random.Random(seed)
    return [rng.choices(VOCABULARY, k=tokens) for _ in range(count)]


def undisturbed(prefix: Sequence[int], count: int, tag: int = 0) -> list[int]:
    """The output of the simulated model where nothing goes wrong."""
    return reference_tokens(list(prefix), count, VOCABULARY, _WORDS, tag)


class Streams:
    """Runs streams on a thread of its own. Each index comes once, in order, or the
    stream raises."""

    def __init__(self, endpoint: str, asked: Sequence[Sequence[int]], tokens: int) -> None:
        self.asked = asked
        self.tokens = tokens
        self.delivered: list[list[int]] = [[] for _ in asked]
        self.finished: list[kvmesh.Finished | None] = [None] * len(asked)
        self._endpoint = endpoint
        self._news = threading.Condition()
        self._done: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
            self._done.set_result(None)
        except BaseException as error:
            self._done.set_exception(error)
        finally:
            with self._news:
                self._news.notify_all()

    async def _all(self) -> None:
        async with kvmesh.AsyncClient(self._endpoint) as client, asyncio.TaskGroup() as group:
            for number in range(len(self.asked)):
                group.create_task(self._one(client, number))

    async def _one(self, client: kvmesh.AsyncClient, number: int) -> None:
        delivered = self.delivered[number]
        async for event in client.generate(
            token_ids=self.asked[number], max_tokens=self.tokens, ignore_end_of_text=True
        ):
            if isinstance(event, kvmesh.Tokens):
                assert event.first_index == len(delivered), "a hole, or a token twice"
                with self._news:
                    delivered.extend(event.ids)
                    self._news.notify_all()
            elif isinstance(event, kvmesh.Finished):
                self.finished[number] = event

    def wait(self, tokens: int) -> None:
        """Waits until each stream has so many tokens."""
        with self._news:
            came = self._news.wait_for(
                lambda: self._done.done() or all(len(d) >= tokens for d in self.delivered), 120
            )
        assert came, f"tokens so far: {[len(d) for d in self.delivered]}"
        assert not self._done.done() or self._done.exception() is None, self._done.exception()

    @property
    def running(self) -> bool:
        """Whether one has not ended."""
        return not self._done.done()

    def join(self) -> list[list[int]]:
        """Waits for all to end well; their outputs."""
        self._done.result(300)
        return self.delivered

    def assert_undisturbed(self) -> None:
        """All ended well, and as if nothing had happened."""
        for prompt, output in zip(self.asked, self.join(), strict=True):
            assert output == undisturbed(prompt, self.tokens)

    def attempts(self) -> list[int]:
        """Attempts of each stream."""
        return [last.usage.attempts if last is not None else 0 for last in self.finished]
