"""Asks a cluster all prompts at once, and compares what comes with the reference."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc.aio
from seeded_prompts import Prompt
from transformers_reference import GREEDY, Reference

import kvmesh
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc as rpc

MODEL = "smollm2-135m"
MARGIN = 1e-3
"""Below this the last bits of a logit decide, and a stream may differ from there."""
TOGETHER = 8
"""Requests at the same time."""


@dataclass(frozen=True)
class Difference:
    arrangement: str
    prompt: int
    length: int
    index: int
    margin: float


@dataclass
class Ledger:
    streams: int = 0
    differences: list[Difference] = field(default_factory=list)

    def compare(
        self,
        arrangement: str,
        reference: Reference,
        prompts: Sequence[Prompt],
        greedy: Sequence[kvmesh.Result],
        sampled: Sequence[kvmesh.Result],
    ) -> None:
        """Counts every stream; fails where one differs at a clear choice."""
        found: list[Difference] = []
        for prompt, *results in zip(prompts, greedy, sampled, strict=True):
            tokens = len(results[0].token_ids)
            for kind, expected, result in zip(
                ("greedy", "sampled"), reference.expected(prompt, tokens), results, strict=True
            ):
                self.streams += 1
                assert len(result.token_ids) == tokens
                index = first_difference(expected.ids, result.token_ids)
                if index is not None:
                    found.append(
                        Difference(
                            f"{arrangement} {kind}", prompt.number, len(prompt.ids), index,
                            expected.margins[index],
                        )
                    )  # fmt: skip
        self.differences += found
        print(f"{arrangement}: {2 * len(prompts)} streams, differing: {found}")
        clear = [difference for difference in found if difference.margin >= MARGIN]
        assert not clear


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    for index, (left, right) in enumerate(zip(one, other, strict=True)):
        if left != right:
            return index
    return None


async def ask_all(
    endpoint: str, prompts: Sequence[Prompt], tokens: int, salt: str, *, sampled: bool
) -> list[kvmesh.Result]:
    """One stream a prompt, several at a time, each prefix under this salt."""
    door = asyncio.Semaphore(TOGETHER)
    running, most = 0, 0

    async with kvmesh.AsyncClient(endpoint) as client:

        async def ask(prompt: Prompt) -> kvmesh.Result:
            nonlocal running, most
            async with door:
                running += 1
                most = max(most, running)
                try:
                    return await client.complete(
                        token_ids=list(prompt.ids),
                        max_tokens=tokens,
                        ignore_end_of_text=True,
                        cache_salt=salt,
                        **(prompt.sampling if sampled else GREEDY),
                    )
                finally:
                    running -= 1

        results = await asyncio.gather(*map(ask, prompts))
    assert all(len(result.token_ids) == tokens for result in results)
    assert most == min(TOGETHER, len(prompts))
    return list(results)


async def warm(address: str, prompts: Sequence[Prompt], salts: Sequence[str]) -> None:
    """Has one worker compute the first half of each prompt, as another router would."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = rpc.WorkerStub(channel).Attach()
        hello = wire.RouterHello(
            version=wire.ProtocolVersion(major=1), router_id="warmer", router_incarnation=1
        )
        await call.write(wire.RouterFrame(hello=hello))
        number = 0
        for salt in salts:
            for prompt in prompts:
                number += 1
                continuation = wire.Continuation(
                    model=MODEL,
                    prompt_ids=first_half(prompt),
                    max_tokens=1,
                    sampling=wire.ResolvedSampling(repetition_penalty=1, top_p=1),
                    cache_salt=salt,
                )
                place = wire.Place(
                    generation=number.to_bytes(16, "big"), owner=1, attempt=1,
                    stage=wire.STAGE_WHOLE, continuation=continuation,
                )  # fmt: skip
                await call.write(wire.RouterFrame(number=number, place=place))
        ended = 0
        while ended < number:
            frame = await call.read()
            assert frame is not grpc.aio.EOF
            for opening in frame.step.openings:
                assert opening.HasField("reserved"), opening
            for end in frame.step.ends:
                assert end.HasField("finished"), end
                ended += 1
        await call.done_writing()


def first_half(prompt: Prompt) -> tuple[int, ...]:
    return prompt.ids[: len(prompt.ids) // 2]
