"""The `openai` package, as applications use it."""

import asyncio

import openai
import pytest
from behind import CALLER, CODER, MOCK, SIM

import kvmesh

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ENDLESS = 100_000


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_a_chat_is_answered_as_over_grpc(client, served):
    answer = client.chat.completions.create(
        model=SIM, messages=MESSAGES, max_completion_tokens=24, seed=7
    )
    with kvmesh.Client(served.target) as grpc:
        expected = grpc.complete(messages=MESSAGES, model=SIM, max_tokens=24, seed=7)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == 24
    assert answer.model == SIM


def test_a_stream_has_the_same_text_and_ends_with_its_usage(client):
    asked = {"model": SIM, "messages": MESSAGES, "max_tokens": 24, "seed": 7}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == whole.choices[0].message.content
    *_, last, usage = chunks
    assert last.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.total_tokens) == ([], whole.usage.total_tokens)


def test_each_chunk_has_the_usage_so_far_where_a_load_client_asks_for_it(client):
    # GuideLLM asks for both.
    options = {"include_usage": True, "continuous_usage_stats": True}
    for stream in (
        client.chat.completions.create(
            model=SIM, messages=MESSAGES, max_tokens=24, stream=True, stream_options=options
        ),
        client.completions.create(
            model=SIM, prompt=[20, 21], max_tokens=24, stream=True, stream_options=options
        ),
    ):
        *chunks, usage = stream
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert (counts[-1], usage.choices) == (24, [])
        assert chunks[-1].usage.total_tokens == usage.usage.total_tokens
        assert {chunk.usage.prompt_tokens for chunk in chunks} == {usage.usage.prompt_tokens}


def test_several_answers_to_several_prompts_have_their_indices(client):
    prompts = [[20, 21, 22], [30, 31]]
    answer = client.completions.create(model=SIM, prompt=prompts, n=2, max_tokens=8, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = client.completions.create(model=SIM, prompt=prompts[1], max_tokens=8, seed=4)
    # From a seed that is given each next answer draws with the next number.
    assert answer.choices[3].text == alone.choices[0].text
    assert answer.usage.prompt_tokens == 5


def test_log_probabilities_are_read(client):
    answer = client.chat.completions.create(
        model=MOCK, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 3
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert [top.logprob for top in token.top_logprobs] == [-0.5, -1.5]
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    legacy = client.completions.create(model=MOCK, prompt="hello", max_tokens=3, logprobs=1)
    assert legacy.choices[0].logprobs.token_logprobs == [-0.5] * 3


def test_models_are_listed(client):
    models = {model.id for model in client.models.list()}
    assert models == {SIM, MOCK, CALLER, CODER}
    assert client.models.retrieve(SIM).id == SIM


def test_errors_are_of_the_packages_own_kinds_and_name_the_field(client):
    asked = {"model": SIM, "messages": MESSAGES}
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="none", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for field, value in {
        "temperature": -1,
        "tools": [tool],
        "response_format": {"type": "json_object"},
        "top_logprobs": 3,
    }.items():
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**asked, **{field: value})
        assert refused.value.param == field
    with pytest.raises(openai.APIStatusError) as embeddings:
        client.with_options(max_retries=2).embeddings.create(model=SIM, input="x")
    assert embeddings.value.status_code == 501
    # It was told that trying again is of no use.
    assert embeddings.value.response.headers["x-should-retry"] == "false"


def test_a_failure_in_the_middle_of_a_stream_is_raised_behind_what_came(client, served):
    served.tell("fail 5 1000000")
    stream = client.completions.create(model=MOCK, prompt="hello", max_tokens=50, stream=True)
    came = []
    with pytest.raises(openai.APIError, match="asked to fail"):
        came.extend(stream)
    assert came


def test_a_clients_timeout_cancels_the_work(client, served):
    served.tell("delay-first-token 3600000")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model=MOCK, messages=MESSAGES)
    served.wait_figures(open_streams=0, open_attempts=0)


def test_signs_of_life_keep_a_stream_within_a_clients_timeout(client, served):
    # The client waits for 5 s between two bytes: without signs of life that was all.
    served.tell("delay-first-token 8000")
    stream = client.with_options(timeout=5).chat.completions.create(
        model=MOCK, messages=MESSAGES, max_tokens=3, stream=True
    )
    assert len(text_of(stream)) > 0


def test_a_stream_that_is_closed_cancels_the_work(client, served):
    stream = client.chat.completions.create(
        model=MOCK, messages=MESSAGES, max_tokens=ENDLESS, stream=True
    )
    next(iter(stream))
    stream.close()
    served.wait_figures(open_streams=0, open_attempts=0)


def test_a_refusal_is_tried_again_when_it_was_told(served):
    cluster = served.cluster
    # One request may come at once, the next one when the rate allows it: ten seconds later.
    target = cluster.start_router("--tenant-requests-per-s", "0.1")
    cluster.wait_live(target, "w")
    with openai.OpenAI(base_url=f"http://{target}/v1", api_key="none", max_retries=8) as client:
        answers = [
            client.completions.with_raw_response.create(model=SIM, prompt=[5, 6], max_tokens=1)
            for _ in range(2)
        ]
    assert [answer.status_code for answer in answers] == [200] * 2
    assert sum(answer.retries_taken for answer in answers) > 0
    cluster.kill_router(target)


async def test_many_streams_of_one_client_do_not_mix(served):
    async with openai.AsyncOpenAI(base_url=served.url, api_key="none") as client:

        async def one(number: int, *, stream: bool) -> str:
            asked = {"model": SIM, "prompt": [50 + number, 7], "max_tokens": 20, "seed": number}
            if not stream:
                return (await client.completions.create(**asked)).choices[0].text
            chunks = await client.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        streamed = await asyncio.gather(*(one(number, stream=True) for number in range(24)))
        whole = await asyncio.gather(*(one(number, stream=False) for number in range(24)))
    assert streamed == whole
    assert len(set(whole)) > 20
