"""A torch worker is killed in the middle of its streams, and another one says the rest.

What was decoded step by step is then computed again in one chunk, as a prompt, so that the last
bits of logits are others: greedy and sampled, the output is that of transformers, by the rule of
test_equality.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from cluster import Cluster
from figures import figures
from seeded_prompts import seeded_prompts
from streams import Ledger
from transformers_reference import GREEDY, Reference

import kvmesh
from kvmesh.client.events import ResultBuilder

PROMPTS, SHORTEST, LONGEST = 4, 20, 120
TOKENS = 48
"""Output of each stream: some seconds of steps."""
SPOKEN = 4
"""Tokens that a stream has when it counts as under way."""
HUNG_S = 600.0
"""A stream that has not ended after this never does."""
DECODE = ("d1", "d2")


class Speakers:
    """Streams that run together; somebody waits until half of them are under way."""

    def __init__(self, client: kvmesh.AsyncClient) -> None:
        self.under_way = asyncio.Event()
        self._client = client
        self._spoken = 0
        self._asked = 0

    async def ask(
        self, ids: Sequence[int], salt: str, sampling: Mapping[str, Any]
    ) -> kvmesh.Result:
        """One stream, to its end."""
        self._asked += 1
        result, delivered, counted = ResultBuilder(), 0, False
        events = self._client.generate(
            timeout=HUNG_S,
            token_ids=list(ids),
            max_tokens=TOKENS,
            ignore_end_of_text=True,
            cache_salt=salt,
            **sampling,
        )
        async with aclosing(events):
            async for event in events:
                result.add(event)
                if isinstance(event, kvmesh.Tokens):
                    assert event.first_index == delivered, "a hole, or a token twice"
                    delivered += len(event.ids)
                if delivered >= SPOKEN and not counted:
                    counted = True
                    self._spoken += 1
                    if 2 * self._spoken >= self._asked:
                        self.under_way.set()
        return result.result()


def busiest(cluster: Cluster) -> str:
    """The worker that decodes the most streams, at least one."""
    table = cluster.wait_table(
        cluster.endpoints[0], lambda table: any(table[n].load.own.decoding for n in DECODE)
    )
    return max(DECODE, key=lambda name: table[name].load.own.decoding)


async def test_streams_of_a_killed_worker_say_what_transformers_says(
    reference: Reference, ledger: Ledger, start
) -> None:
    prompts = seeded_prompts(reference.folder, PROMPTS, SHORTEST, LONGEST)
    threads = ("--threads", "1")
    with start(p="prefill", d1="decode", d2="decode", arguments=threads) as cluster:
        endpoint = cluster.endpoints[0]
        async with kvmesh.AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
            speakers = Speakers(client)
            greedy, sampled = (
                [
                    group.create_task(speakers.ask(prompt.ids, salt, sampling or prompt.sampling))
                    for prompt in prompts
                ]
                for salt, sampling in (("greedy", GREEDY), ("sampled", None))
            )
            await speakers.under_way.wait()
            # Children are for the main thread; meanwhile the streams wait to be read.
            cluster.kill(busiest(cluster))
        results = [[task.result() for task in tasks] for tasks in (greedy, sampled)]
        moved = sum(result.usage.attempts > 1 for of in results for result in of)
        now = figures(endpoint)
        cluster.wait_empty(*cluster.workers)

    assert moved > 0
    assert now['migrations_total{cause="died"}'] > 0
    assert now["recomputed_tokens_total"] > 0
    assert now["failed_total"] == now["violations_total"] == 0
    ledger.compare("a killed worker", reference, prompts, *results)
