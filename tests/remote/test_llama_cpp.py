"""llama.cpp's own server, attached, as a real process with a real model."""

import asyncio
import json
import sys
import time
import urllib.request
from pathlib import Path

import llama_cpp_server
import openai
import pytest
from cluster import START_S, Cluster
from engine_harness import Driver, running, until
from tokenizers import Tokenizer

import kvmesh
from kvmesh import models
from kvmesh.engine.remote.served import build
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import WorkerSettings

pytestmark = pytest.mark.skipif(
    bool(llama_cpp_server.missing()),
    reason=f"{llama_cpp_server.missing()} is not installed: make test-llama-cpp",
)

MODEL = "smollm2-135m"
SLOTS = 2
GREEDY = wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0)
ENDS = [0, 2]
COUNT_S = 120
FACES = "Привет! 😀😃😄😁 Привет! 😀😃😄😁 Привет! 😀😃"
LETTERS = "日本語の文章を書いてください。日本語の文章を書いてください。日本語の文章を"


class LlamaCpp:
    """A server in a cluster of its own."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder)
        command = [sys.executable, llama_cpp_server.__file__, str(SLOTS)]
        self.child = self.cluster.children.spawn("llama-cpp", command)
        log, deadline = folder / "logs" / "llama-cpp.log", time.monotonic() + START_S
        while "listening on 127.0.0.1:" not in (text := log.read_text() if log.exists() else ""):
            assert self.child.process.poll() is None, text[-4000:]
            assert time.monotonic() < deadline, text[-4000:]
            self.cluster.children.wait(0.05)
        # Its own log says so, too.
        said = [line for line in text.splitlines() if line.startswith("listening on ")]
        self.address = said[0].removeprefix("listening on ")

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(
            f"http://{self.address}{path}", data, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=COUNT_S) as answer:
            return json.loads(answer.read())

    def complete(self, ids, count):
        """What it says by its own API, whole."""
        asked = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True}
        return self.ask("/completion", asked)

    def wait_idle(self) -> None:
        """Until no slot computes: a request of these tests would for much longer."""
        deadline = time.monotonic() + 10
        while any(slot["is_processing"] for slot in self.ask("/slots")):
            assert time.monotonic() < deadline
            # Nothing tells of it.
            time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = LlamaCpp(tmp_path_factory.mktemp("llama-cpp"))
    try:
        yield made
    finally:
        made.cluster.close()


@pytest.fixture(scope="session")
def folder():
    return models.pull(MODEL)


@pytest.fixture(scope="session")
def text(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def built(server, folder, **arguments):
    given = {"server": f"http://{server.address}", "tokenizer": str(folder), **arguments}
    settings = WorkerSettings(engine="remote", engine_arguments=given, served_name=MODEL)
    return build(settings, "w", 1, lambda line: None)


class Nobody:
    """A sink between tests."""

    def begin_step(self, predicted_ms) -> None: ...

    def step(self, output) -> None: ...

    def ended(self) -> None: ...


@pytest.fixture(scope="module")
def one(server, folder):
    """Attached once: timing its first requests takes seconds."""
    made = built(server, folder)
    made.engine.start(Nobody())
    yield made
    asyncio.run(made.engine.close())


@pytest.fixture
async def driver(one):
    found = Driver(one.engine)
    one.engine._loop.post(lambda core: core.serve(found))
    yield found
    one.engine._loop.post(lambda core: core.serve(Nobody()))
    if found.failure is not None:
        raise found.failure


def place(driver, ids, **more):
    given = {"sampling": GREEDY, "stop_token_ids": ENDS, **more}
    return driver.place([*ids], **given)


async def ended(attempt, name="finished"):
    async with asyncio.timeout(COUNT_S):
        while attempt.end is None and not attempt.refused:
            attempt.changed.clear()
            await attempt.changed.wait()
    assert not attempt.refused, attempt.opening
    assert attempt.end.WhichOneof("end") == name, attempt.end
    return attempt


def numbers(seed, count):
    """Ids that no other test has at its beginning."""
    return [(seed * 997 + at * 37) % 40_000 + 100 for at in range(count)]


async def test_what_it_tells_of_itself(one, driver) -> None:
    record, can, steps = one.model, one.engine.capabilities(), one.engine.step_model()
    assert (record.name, record.vocabulary_size) == (MODEL, 49_152)
    assert record.context_length == llama_cpp_server.CONTEXT
    assert [*record.end_of_text_ids] == [2]
    assert (can.engine, can.max_batch, can.max_logprobs) == ("llama.cpp", SLOTS, 20)
    assert not can.cache_events
    assert can.no_cache_salt
    # It was seen what a prompt takes: decoding has no part in these.
    assert steps.a_ms + steps.b_ms + steps.c_ms > 0


async def test_streams_are_what_the_server_says_by_its_own_api(server, driver, text) -> None:
    for said in ("The capital of France is", "Once upon a time", "def fibonacci(n):"):
        ids = text.encode(said).ids
        told = await asyncio.to_thread(server.complete, ids, 16)
        attempt = await ended(place(driver, ids, max_tokens=16))
        assert attempt.tokens == told["tokens"]
        assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH
    await driver.idle()


async def test_characters_of_several_tokens_are_whole(server, driver, text) -> None:
    """Of these the server's streams tell the last token alone."""
    for asked in (FACES, LETTERS):
        ids = text.encode(asked).ids
        told = await asyncio.to_thread(server.complete, ids, 24)
        assert sum(len(text.encode(sign).ids) > 1 for sign in set(told["content"])) > 2
        attempt = await ended(place(driver, ids, max_tokens=24))
        # All of it, but for a character that the end cut off.
        assert attempt.tokens == told["tokens"][: len(attempt.tokens)]
        assert text.decode(attempt.tokens) == told["content"].rstrip("\ufffd")


async def test_the_models_own_end_ends_it(server, driver, text) -> None:
    asked = "<|im_start|>user\nSay only: yes<|im_end|>\n<|im_start|>assistant\n"
    attempt = await ended(place(driver, text.encode(asked).ids, max_tokens=400))
    assert attempt.end.finished.reason == inference.FINISH_REASON_STOP
    assert attempt.end.finished.stop_token_id == 2
    assert attempt.tokens[-1] == 2


async def test_a_continuation_goes_on_where_it_was(server, driver, text) -> None:
    ids = text.encode("List the months of the year:").ids
    whole = (await ended(place(driver, ids, max_tokens=12))).tokens
    rest = await ended(place(driver, ids, output=whole[:5], max_tokens=12))
    assert rest.tokens == whole[5:]


async def test_a_second_turn_finds_what_the_first_one_left(driver) -> None:
    ids = numbers(1, 100)
    first = await ended(place(driver, ids, max_tokens=4))
    assert first.end.timings.cached_tokens == 0
    again = await ended(place(driver, [*ids, *first.tokens, 7], max_tokens=2))
    timings = again.end.timings
    assert 100 <= timings.cached_tokens <= 104
    assert timings.cached_tokens + timings.computed_tokens == 105


async def test_without_a_cache_no_prompt_finds_another_ones(server, folder) -> None:
    ids = numbers(2, 100)
    made = await asyncio.to_thread(built, server, folder, salted_prompts="uncached")
    async with running(made.engine) as driver:
        assert not driver.engine.capabilities().no_cache_salt
        for salt in ("mine", "yours"):
            attempt = await ended(place(driver, ids, max_tokens=4, cache_salt=salt))
            assert attempt.end.timings.cached_tokens == 0
            assert attempt.end.timings.computed_tokens == 100


async def test_log_probabilities_are_those_of_the_model(server, driver, text) -> None:
    ids = text.encode("The capital of France is").ids
    attempt = await ended(place(driver, ids, max_tokens=3, logprobs=2))
    assert len(attempt.logprobs) == len(attempt.tokens) == 3
    for token, entry in zip(attempt.tokens, attempt.logprobs, strict=True):
        assert entry.top_ids[0] == token, "greedy takes the likeliest"
        assert entry.logprob == pytest.approx(entry.top_logprobs[0])
        assert 0 > entry.top_logprobs[0] > entry.top_logprobs[1]


async def test_a_seed_draws_the_same_again(server, driver, text) -> None:
    ids = text.encode("Once upon a time").ids
    warm = wire.ResolvedSampling(temperature=1.0, top_p=0.9, repetition_penalty=1.0, seed=7)
    other = wire.ResolvedSampling(temperature=1.0, top_p=0.9, repetition_penalty=1.0, seed=8)
    drawn = [
        (await ended(place(driver, ids, max_tokens=16, sampling=sampling))).tokens
        for sampling in (warm, warm, other)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("stage", ["waiting", "decoding"])
async def test_a_cancel_ends_the_request_there(server, driver, stage) -> None:
    # Slots that are taken make the next one wait.
    count = 1 if stage == "decoding" else SLOTS + 1
    attempts = [place(driver, numbers(at + 3, 60), max_tokens=900) for at in range(count)]
    await attempts[0].until(lambda a: len(a.tokens) > 2)
    for attempt in reversed(attempts):
        driver.engine.cancel([attempt.id])
        await ended(attempt, "cancelled")
    await driver.idle()
    await asyncio.to_thread(server.wait_idle)


async def test_more_streams_than_slots_are_all_served(driver) -> None:
    attempts = [place(driver, numbers(at + 10, 30), max_tokens=40) for at in range(12)]
    for attempt in attempts:
        await ended(attempt)
    assert not driver.over.is_set()
    await until(lambda: driver.engine.load().kv.running == 0)
    await driver.idle()


def follow_a_grammar(client) -> None:
    city = {"type": "string", "enum": ["Paris", "Rome"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 100,
             "messages": [{"role": "user", "content": "Where is the Louvre?"}]}  # fmt: skip
    format = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = client.chat.completions.create(**asked, response_format=format)
    assert json.loads(answer.choices[0].message.content)["city"] in city["enum"]
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    called = client.chat.completions.create(**asked, tools=[tool], tool_choice="required",
                                            parallel_tool_calls=False)  # fmt: skip
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in city["enum"]


def test_a_router_chats_by_it(server, folder, text) -> None:
    cluster = server.cluster
    endpoint = cluster.start_router()
    command = [sys.executable, "-m", "kvmesh.cli", "attach", f"http://{server.address}",
               "--etcd", cluster.etcd, "--worker-id", "s", "--served-name", MODEL,
               "--tokenizer", str(folder)]  # fmt: skip
    cluster.workers["s"] = cluster.children.spawn("s", command, announce=True)
    cluster.wait_live(endpoint, "s")
    client = openai.OpenAI(base_url=f"http://{endpoint}/v1", api_key="none", max_retries=0)
    turn = [{"role": "user", "content": "What is the capital of France? " * 4}]
    first = client.chat.completions.create(model=MODEL, messages=turn, max_tokens=24, temperature=0)
    assert "Paris" in first.choices[0].message.content
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    turn += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Say it again."},
    ]
    chunks = [*client.chat.completions.create(
        model=MODEL, messages=turn, max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )]  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 30
    faces = client.completions.create(model=MODEL, prompt=FACES, max_tokens=24, temperature=0)
    ids = text.encode(FACES).ids
    assert faces.choices[0].text == server.complete(ids, 24)["content"]
    follow_a_grammar(client)
    with kvmesh.Client(endpoint) as mesh:
        for event in mesh.generate(prompt="Count to a thousand: 1, 2, 3,", max_tokens=900):
            if isinstance(event, kvmesh.Tokens):
                break
    cluster.wait_empty("s")
    server.wait_idle()
    cluster.assert_alive()


async def test_with_the_server_the_engine_ends(server, driver) -> None:
    """The last one: the server is killed in mid-stream."""
    attempt = place(driver, numbers(30, 20), max_tokens=900)
    await attempt.until(lambda a: len(a.tokens) > 2)
    server.child.process.kill()
    async with asyncio.timeout(30):
        await driver.over.wait()
