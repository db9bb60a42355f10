"""The whole way of a request, with real processes at every station."""

import asyncio
import json
import subprocess
import sys

import grpc
import pytest

import kvmesh
from kvmesh.v1 import inference_pb2, inference_pb2_grpc

PROMPT = "Tell me of the sea, and of what lies under it." * 8


def test_tokens_come_in_order_between_accepted_and_finished(client) -> None:
    events = list(client.generate(prompt=PROMPT, max_tokens=40, ignore_end_of_text=True))
    accepted, *tokens, finished = events
    assert isinstance(accepted, kvmesh.Accepted)
    assert isinstance(finished, kvmesh.Finished)
    indices = [t.first_index + i for t in tokens for i in range(len(t.ids))]
    assert indices == list(range(40))
    assert finished.finish_reason == "length"
    assert finished.usage.output_tokens == 40
    assert finished.usage.prompt_tokens == accepted.prompt_tokens > 0
    assert finished.usage.attempts == 1


def test_prompt_chat_and_ids_give_what_they_say(client) -> None:
    ids = client.tokenize(prompt=PROMPT)
    by_text = client.complete(prompt=PROMPT, max_tokens=12, temperature=0)
    by_ids = client.complete(token_ids=ids, max_tokens=12, temperature=0)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == by_ids.text
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.complete(messages=messages, max_tokens=12, temperature=0)
    chat_ids = client.tokenize(messages=messages)
    again = client.complete(token_ids=chat_ids, max_tokens=12, temperature=0)
    assert chat.token_ids == again.token_ids
    assert chat.usage.prompt_tokens == len(chat_ids)


def test_kv_moves_from_prefill_to_decode_and_a_second_turn_finds_it(client) -> None:
    prompt = "A prompt of its own, long enough for some blocks. " * 10
    first = client.complete(prompt=prompt, max_tokens=8, temperature=0)
    assert first.timings.transferred_bytes > 0
    assert first.usage.cached_tokens == 0
    second = client.complete(prompt=prompt, max_tokens=8, temperature=0)
    assert second.token_ids == first.token_ids
    assert second.usage.cached_tokens > 0


def test_timings_of_what_happened_are_there_and_fit_into_each_other(client) -> None:
    prompt = "Where does the time go, and how much of it? " * 20
    t = client.complete(prompt=prompt, max_tokens=20, ignore_end_of_text=True).timings
    happened = (
        "queue_ms", "tokenize_ms", "decide_ms", "worker_queue_ms", "prefill_ms", "transfer_ms",
        "first_token_ms", "decode_ms", "total_ms", "longest_gap_ms", "longest_gap_start_ms",
        "transferred_bytes",
    )  # fmt: skip
    assert [name for name in happened if not getattr(t, name) > 0] == []
    before = t.queue_ms + t.tokenize_ms + t.decide_ms + t.prefill_ms
    rounding = 0.001
    assert before <= t.first_token_ms + rounding
    assert t.first_token_ms + t.decode_ms <= t.total_ms + rounding
    assert t.longest_gap_ms <= t.decode_ms + rounding
    assert 0 <= t.transfer_tail_ms <= t.transfer_ms + rounding
    # It is what came after prefill, and ends before decode begins.
    assert before + t.worker_queue_ms + t.transfer_tail_ms <= t.total_ms + rounding
    # Nothing to choose, nothing to move, nothing after the first token.
    one = client.complete(prompt=prompt, max_tokens=1).timings
    assert (one.transfer_ms, one.transferred_bytes, one.decode_ms) == (0, 0, 0)


def test_seeded_sampling_repeats_itself(client) -> None:
    options = {"prompt": PROMPT, "max_tokens": 16, "temperature": 1.0, "seed": 7}
    assert client.complete(**options).token_ids == client.complete(**options).token_ids


def test_a_stop_string_ends_the_text_before_it(client) -> None:
    whole = client.complete(prompt=PROMPT, max_tokens=48, ignore_end_of_text=True, temperature=0)
    stop = whole.text[10:13]
    cut = client.complete(
        prompt=PROMPT, max_tokens=48, ignore_end_of_text=True, temperature=0, stop=stop
    )
    assert cut.finish_reason == "stop"
    assert cut.stop_string == stop
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_loop_left_early_frees_everything(pair, client) -> None:
    for event in client.generate(prompt=PROMPT, max_tokens=4_000, ignore_end_of_text=True):
        if isinstance(event, kvmesh.Tokens):
            break
    pair.wait_empty("p", "d")


def test_a_deadline_is_kept_and_frees_everything(pair, client) -> None:
    with pytest.raises(kvmesh.MeshError) as caught:
        client.complete(prompt=PROMPT, max_tokens=8_000, ignore_end_of_text=True, timeout=0.5)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    pair.wait_empty("p", "d")


async def test_many_streams_at_once_each_get_their_own_tokens(pair) -> None:
    async with kvmesh.AsyncClient(pair.endpoints[0]) as client:
        prompts = [f"Prompt number {i}. " * (i % 7 + 1) for i in range(48)]

        async def ask(prompt: str) -> kvmesh.Result:
            return await client.complete(
                prompt=prompt, max_tokens=24, temperature=0, ignore_end_of_text=True
            )

        together = await asyncio.gather(*map(ask, prompts))
        alone = [await ask(prompt) for prompt in prompts[:6]]
    assert [r.token_ids for r in together[:6]] == [r.token_ids for r in alone]
    assert all(len(r.token_ids) == 24 for r in together)
    pair.wait_empty("p", "d")


def test_the_model_is_listed(client) -> None:
    (model,) = client.models()
    assert model.ready
    assert model.chat
    assert model.context_length > 0


def test_an_unknown_model_names_those_that_exist(client) -> None:
    (model,) = client.models()
    with pytest.raises(kvmesh.ModelNotFoundError, match=model.name):
        client.complete(prompt="a", model="none-such")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "temperature": -1.0}, "sampling.temperature"),
        ({"prompt": "a", "top_p": float("nan")}, "sampling.top_p"),
        ({"prompt": "a", "stop": ["x"] * 1_000}, "stopping.stop"),
        ({"prompt": "a", "max_tokens": 2_000_000_000}, "stopping.max_tokens"),
    ],
)
def test_what_is_out_of_range_is_named(client, options, field) -> None:
    with pytest.raises(kvmesh.InvalidRequestError) as caught:
        client.complete(**options)
    assert field in [violation.field for violation in caught.value.violations]


def test_what_is_not_there_says_so(pair, client) -> None:
    stub = inference_pb2_grpc.InferenceStub(pair.channel(pair.endpoints[0]))
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Resume(inference_pb2.ResumeRequest(generation_id="0" * 32)))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(kvmesh.MeshError) as refused:
        client.complete(prompt="a", n=2)
    assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_the_command_line_prints_one_object(pair) -> None:
    printed = subprocess.run(
        [
            sys.executable, "-m", "kvmesh", "generate", "--json", "--max-tokens", "5",
            "--endpoint", pair.endpoints[0], "Hello",
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    answer = json.loads(printed.stdout)
    assert {"token_ids", "text", "finish_reason", "usage", "timings"} <= answer.keys()
    assert len(answer["token_ids"]) == answer["usage"]["output_tokens"]
