"""Servers of vLLM's own, attached: gRPC with SMG's servicer, gRPC of its Rust front end, and
OpenAI's HTTP.

One at a time: each is an engine.
"""

import asyncio
import sys
from contextlib import asynccontextmanager

import pytest
from cluster import Cluster
from engine_harness import chains_of, running, until
from in_process import ended, place
from seeded_prompts import seeded_prompts
from stock import RUST_FRONT_END, stock
from streams import MARGIN, first_difference
from workers import MODEL

import kvmesh
from kvmesh.engine.remote.served import build
from kvmesh.engine.remote.server import LostError
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.worker.settings import WorkerSettings


@pytest.fixture(scope="module", params=["smg", "first_party", "openai"])
def server(request, folder, tmp_path_factory):
    if request.param == "first_party" and not RUST_FRONT_END.exists():
        pytest.skip(f"vLLM's Rust front end is not at {RUST_FRONT_END}: make test-vllm")
    with stock(request.param, folder, tmp_path_factory.mktemp("stock")) as made:
        yield made


@pytest.fixture
def prompts(folder):
    return seeded_prompts(folder, 4, 20, 120)


def arguments(server, folder):
    # vLLM dies of seeds on a CPU.
    given = {"server": server.address, "seeded": "false"}
    if server.wire == "first_party":
        given["server_ca"] = str(server.ca_file)
    return given if server.wire == "smg" else {**given, "tokenizer": str(folder)}


@asynccontextmanager
async def attached(server, folder):
    settings = WorkerSettings(engine="remote", engine_arguments=arguments(server, folder))
    built = await asyncio.to_thread(build, settings, "w", 1, lambda line: None)
    async with running(built.engine) as driver:
        driver.built = built
        yield driver


async def test_streams_are_those_of_transformers(server, folder, prompts, reference) -> None:
    async with attached(server, folder) as driver:
        can = driver.engine.capabilities()
        assert driver.built.model.name == MODEL
        assert driver.built.model.context_length == 512
        assert (can.block_tokens, can.cache_events) == (32, server.wire != "openai")
        assert can.pool_blocks > 100
        attempts = [place(driver, prompt.ids, max_tokens=12, logprobs=2) for prompt in prompts]
        for prompt, attempt in zip(prompts, attempts, strict=True):
            await ended(attempt)
            assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH
            expected, _ = reference.expected(prompt, 12)
            index = first_difference(expected.ids, attempt.tokens)
            assert index is None or expected.margins[index] < MARGIN
            # A greedy token is the likeliest.
            first = attempt.logprobs[0]
            assert first.top_ids[0] == attempt.tokens[0]
            assert abs(first.logprob - first.top_logprobs[0]) < 1e-4
            assert len(first.top_ids) == 2
        await driver.idle()


async def test_a_server_that_nobody_vouches_for_is_not_attached(server, folder) -> None:
    if server.wire != "first_party":
        pytest.skip("the server has no TLS")
    given = {**arguments(server, folder), "server_ca": ""}
    settings = WorkerSettings(engine="remote", engine_arguments=given)
    with pytest.raises(LostError, match="CERTIFICATE_VERIFY_FAILED"):
        await asyncio.to_thread(build, settings, "w", 1, lambda line: None)


async def test_a_continuation_goes_on_where_it_was(server, folder, prompts) -> None:
    ids = prompts[2].ids
    async with attached(server, folder) as driver:
        whole = (await ended(place(driver, ids, max_tokens=12))).tokens
        rest = await ended(place(driver, ids, output=whole[:5], max_tokens=12))
        assert rest.tokens == whole[5:]


async def test_a_second_turn_finds_what_the_first_one_left(server, folder) -> None:
    # Not of the other tests: the server's cache is not emptied between them.
    ids = list(range(1000, 1100))
    async with attached(server, folder) as driver:
        first = await ended(place(driver, ids, max_tokens=4))
        assert first.end.timings.cached_tokens == 0
        assert first.end.timings.computed_tokens == 100
        if server.wire == "openai":
            assert not chains_of(driver.engine.snapshot())
        else:
            await until(lambda: len(driver.engine._cache) >= 3)
        again = await ended(place(driver, [*ids, *first.tokens, 7], max_tokens=2))
        # Told by events beforehand, or at its end alone.
        assert again.opening.reserved.tokens_held == (0 if server.wire == "openai" else 96)
        assert again.end.timings.cached_tokens == 96
        assert again.end.timings.computed_tokens == 9


@pytest.mark.parametrize("stage", ["placed", "decoding"])
async def test_a_cancel_leaves_nothing_there(server, folder, prompts, stage) -> None:
    async with attached(server, folder) as driver:
        attempt = place(driver, prompts[0].ids, max_tokens=380)
        if stage == "decoding":
            await attempt.until(lambda a: len(a.tokens) > 2)
        driver.engine.cancel([attempt.id])
        await ended(attempt, "cancelled")
        await driver.idle()
        # A stream beside it would show that it still runs.
        assert (await ended(place(driver, prompts[1].ids, max_tokens=2))).tokens


def test_a_router_serves_text_by_it(server, folder, tmp_path) -> None:
    cluster = Cluster(tmp_path)
    try:
        endpoint = cluster.start_router()
        flags = [part for n, v in arguments(server, folder).items() for part in _flag(n, v)]
        command = [sys.executable, "-m", "kvmesh.cli", "attach", "--etcd", cluster.etcd,
                   "--worker-id", "s", *flags]  # fmt: skip
        cluster.workers["s"] = cluster.children.spawn("s", command, announce=True)
        cluster.wait_live(endpoint, "s")
        with kvmesh.Client(endpoint) as client:
            result = client.complete(prompt="The capital of France is", max_tokens=8)
        assert "Paris" in result.text
        cluster.wait_empty("s")
    finally:
        cluster.close()


def _flag(name, value):
    return ["--no-seeded"] if name == "seeded" else [f"--{name.replace('_', '-')}", value]


async def test_with_the_server_the_engine_ends(server, folder, prompts) -> None:
    """The last one: the server is killed in mid-stream."""
    async with attached(server, folder) as driver:
        attempt = place(driver, prompts[0].ids, max_tokens=380)
        await attempt.until(lambda a: len(a.tokens) > 2)
        server.kill()
        async with asyncio.timeout(30):
            await driver.over.wait()
