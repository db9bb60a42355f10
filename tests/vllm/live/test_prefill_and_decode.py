"""Prefill and decode by vLLM over NIXL, behind a router: one after the other, since the last
tests change roles and kill."""

import asyncio
import json
from contextlib import aclosing

import openai
import pytest
from attached import attached
from seeded_prompts import seeded_prompts
from streams import MARGIN, ask_all, first_difference
from workers import MODEL

import kvmesh
from kvmesh.client.events import ResultBuilder
from kvmesh.v1 import worker_pb2 as wire

TOKENS = 12
RELEASE_S = 90
"""NIXL keeps blocks that nobody took for a lease of 30 s."""


@pytest.fixture
def prompts(folder):
    return seeded_prompts(folder, 6, 40, 200)


@pytest.fixture
def endpoint(pair):
    return pair.endpoints[0]


async def test_the_output_is_that_of_one_engine(pair, endpoint, prompts, reference) -> None:
    results = await ask_all(endpoint, prompts, TOKENS, "pair", sampled=False)
    for prompt, result in zip(prompts, results, strict=True):
        expected, _ = reference.expected(prompt, TOKENS)
        index = first_difference(expected.ids, result.token_ids)
        assert index is None or expected.margins[index] < MARGIN
        assert result.usage.attempts == 1
        # Decode computes what no full block holds, not the prompt again.
        assert result.usage.computed_tokens < len(prompt.ids) + 32
    pair.wait_empty("p", "d", seconds=RELEASE_S)


async def test_the_next_turn_finds_the_last_one_cached(pair, endpoint) -> None:
    """By vLLM's cache events: the router knows before it asks."""
    async with kvmesh.AsyncClient(endpoint) as client:
        turn = [{"role": "user", "content": "Name a river of Europe. " * 12}]
        first, guessed = await _ask(client, turn)
        assert guessed == 0
        assert first.usage.cached_tokens == 0
        pair.wait_empty("p", "d", seconds=RELEASE_S)
        held = first.usage.prompt_tokens // 32
        pair.wait_table(endpoint, lambda table: table["p"].indexed_blocks >= held)
        turn += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And another one?"},
        ]
        second, guessed = await _ask(client, turn)
    assert guessed >= 64
    assert second.usage.cached_tokens == guessed
    assert second.usage.computed_tokens < second.usage.prompt_tokens - 64 + 32
    pair.wait_empty("p", "d", seconds=RELEASE_S)


async def test_structured_answers_and_forced_calls_follow_their_grammar(pair, endpoint) -> None:
    city = {"type": "string", "enum": ["Paris", "Rome"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name in ("weather", "time")
    ]
    format = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Where is the Louvre?"}]}
    async with openai.AsyncOpenAI(base_url=f"http://{endpoint}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            **asked, response_format=format, max_tokens=60, temperature=0
        )
        assert json.loads(answer.choices[0].message.content)["city"] in city["enum"]
        called = await client.chat.completions.create(
            **asked, tools=tools, tool_choice="required", parallel_tool_calls=False,
            max_tokens=120, temperature=0,
        )  # fmt: skip
    (call,) = called.choices[0].message.tool_calls
    assert called.choices[0].finish_reason == "tool_calls"
    assert call.function.name in ("weather", "time")
    assert json.loads(call.function.arguments)["city"] in city["enum"]
    pair.wait_empty("p", "d", seconds=RELEASE_S)


async def _ask(client, messages):
    """The result, and the cached tokens that the router counted on."""
    builder, guessed = ResultBuilder(), None
    async for event in client.generate(
        messages=messages, max_tokens=8, temperature=0, placements=True
    ):
        if isinstance(event, kvmesh.Placed):
            guessed = event.cached_tokens
        builder.add(event)
    return builder.result(), guessed


@pytest.mark.parametrize("after", [kvmesh.Accepted, kvmesh.Tokens])
async def test_a_client_that_goes_leaves_nothing(pair, endpoint, after) -> None:
    async with kvmesh.AsyncClient(endpoint) as client:
        stream = client.generate(
            token_ids=list(range(300, 700)), max_tokens=100, ignore_end_of_text=True
        )
        async with aclosing(stream):
            async for event in stream:
                if isinstance(event, after):
                    break
    pair.wait_empty("p", "d", seconds=RELEASE_S)


async def test_a_cancel_right_behind_the_hand_off_lets_the_blocks_go(pair) -> None:
    """Decode has accepted the request when it is aborted, so prefill hears of it at once."""
    ids = list(range(2_000, 2_300))
    async with (
        attached(pair.worker_address("p")) as prefill,
        attached(pair.worker_address("d")) as decode,
    ):
        _, end = await prefill.run(ids, wire.STAGE_PREFILL)
        hand_off = wire.HandOff(engine=end.handed_off.engine)
        assert pair.info("p").residue.held_blocks
        generation = await decode.place(ids, wire.STAGE_DECODE, hand_off=hand_off)
        await decode.cancel(generation)
        _, end = await decode.end(generation)
        assert end.HasField("cancelled")
        pair.wait_empty("p", "d", seconds=RELEASE_S)


@pytest.mark.parametrize("how", ["nobody there", "expired"])
async def test_kv_that_does_not_come_is_computed_by_decode(pair, how) -> None:
    ids = list(range(3_000, 3_200)) if how == "expired" else list(range(4_000, 4_200))
    async with (
        attached(pair.worker_address("p")) as prefill,
        attached(pair.worker_address("d")) as decode,
    ):
        _, end = await prefill.run(ids, wire.STAGE_PREFILL)
        hand_off, waited_ms = wire.HandOff(engine=end.handed_off.engine), 0.0
        if how == "expired":
            waited_ms = 60_000.0
        else:
            said = json.loads(hand_off.engine.payload)
            # The discard port: nobody listens.
            said["params"] |= {"remote_port": 9, "remote_engine_id": "gone"}
            hand_off.engine.payload = json.dumps(said).encode()
        tokens, end = await decode.run(
            ids, wire.STAGE_DECODE, hand_off=hand_off, waited_ms=waited_ms
        )
        assert end.HasField("finished"), end
        assert end.timings.computed_tokens == len(ids)
        again, _ = await decode.run(ids, wire.STAGE_WHOLE)
        assert tokens == again
    pair.wait_empty("p", "d", seconds=RELEASE_S)


async def test_a_killed_worker_s_stream_is_finished_elsewhere(pair, endpoint) -> None:
    """Decode dies; prefill, which may do both now, goes on from the last token."""
    _set_role(pair, "p", wire.ROLE_BOTH)
    pair.wait_table(endpoint, lambda table: table["p"].load.role == wire.ROLE_BOTH)
    ids, tokens = list(range(5_000, 5_100)), 40
    async with kvmesh.AsyncClient(endpoint) as client:
        got: list[int] = []
        killed = False
        async for event in client.generate(
            token_ids=ids, max_tokens=tokens, temperature=0, ignore_end_of_text=True
        ):
            if isinstance(event, kvmesh.Tokens):
                got += event.ids
                if not killed and len(got) >= 3:
                    killed = True
                    holder = next(n for n in ("d", "p") if pair.info(n).load.own.decoding)
                    await asyncio.to_thread(pair.kill, holder)
        assert killed
        assert len(got) == tokens
        whole = await client.complete(
            token_ids=ids, max_tokens=tokens, temperature=0, ignore_end_of_text=True
        )
    # A continuation computes in one chunk what the first run decoded: last bits differ.
    index = first_difference(got, list(whole.token_ids))
    assert index is None or index > 3


def _set_role(pair, name, role) -> None:
    from kvmesh.v1 import worker_pb2_grpc

    stub = worker_pb2_grpc.WorkerStub(pair.channel(pair.worker_address(name)))
    stub.SetRole(wire.SetRoleRequest(role=role), timeout=10)
