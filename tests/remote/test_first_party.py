"""vLLM's own gRPC as a server. What is common to all wires is tested with SMG's."""

import asyncio
import struct
from contextlib import asynccontextmanager

import grpc
import pytest
from engine_harness import running, until
from fake_core import tokens_after
from fake_first_party import serve
from fake_loop import do, there
from fake_model import BLOCK, BLOCKS, CONTEXT, MODEL, FakeModel

from kvmesh.engine.remote.first_party import endpoint
from kvmesh.engine.remote.served import build
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.vllm_wire import control_pb2 as control
from kvmesh.worker.settings import SettingError, WorkerSettings

GREEDY = wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0)


def prompt(length, seed=0):
    return [(seed * 131 + at * 7) % 1899 + 51 for at in range(length)]


def place(driver, ids, *args, **more):
    more.setdefault("sampling", GREEDY)
    return driver.place(ids, *args, **more)


@asynccontextmanager
async def served(folder, sources=(), **arguments):
    model = FakeModel()
    server, port, service = await there(serve(model))
    service.sources = [*sources]
    try:
        given = {"server": f"vllm://127.0.0.1:{port}", "tokenizer": str(folder), **arguments}
        settings = WorkerSettings(engine="remote", engine_arguments=given)
        built = await asyncio.to_thread(build, settings, "w", 1, lambda line: None)
        async with running(built.engine) as driver:
            driver.built, driver.model, driver.service = built, model, service
            driver.server = server
            model.seen.clear()
            model.requests.clear()
            yield driver
    finally:
        await there(server.stop(None))


async def test_it_is_told_apart_by_asking(folder) -> None:
    async with served(folder) as driver:
        record, can = driver.built.model, driver.engine.capabilities()
        assert (record.name, record.context_length) == (MODEL, CONTEXT)
        # From the tokeniser's files: this wire does not say.
        assert record.vocabulary_size == 2000
        assert (can.block_tokens, can.pool_blocks, can.max_batch) == (BLOCK, BLOCKS, 64)
        assert not can.cache_events
        assert [*record.adapters] == ["poet"]
        assert len(record.adapters["poet"]) == 64


async def test_what_was_cached_is_said_at_the_end_and_teaches_nothing(folder) -> None:
    async with served(folder) as driver:
        driver.model.cached = 32
        attempt = place(driver, prompt(40), max_tokens=5, trace=True)
        assert await attempt.ended() == "finished"
        timings = attempt.end.timings
        assert (timings.cached_tokens, timings.computed_tokens) == (32, 8)
        (chunk,) = [span for span in timings.trace if span.name == "prefill_chunk"]
        assert chunk.tokens == 8
        assert [s.prefill_tokens for s in driver.samples if s.prefill_tokens] == []


async def test_a_server_that_speaks_neither_is_refused() -> None:
    server = grpc.aio.server

    async def empty():
        made = server()
        port = made.add_insecure_port("127.0.0.1:0")
        await made.start()
        return made, port

    made, port = await there(empty())
    settings = WorkerSettings(
        engine="remote", engine_arguments={"server": f"vllm://127.0.0.1:{port}"}
    )
    with pytest.raises(SettingError, match="speaks neither"):
        await asyncio.to_thread(build, settings, "w", 1, lambda line: None)
    await there(made.stop(None))


async def test_streams_come_whole_and_a_request_says_what_was_asked(folder) -> None:
    async with served(folder, priorities="true") as driver:
        sampling = wire.ResolvedSampling(
            temperature=0.5, top_k=40, top_p=0.75, min_p=0.25, repetition_penalty=1.25,
            frequency_penalty=0.5, presence_penalty=-0.5, seed=12,
            logit_bias=[inference.LogitBias(token_id=7, bias=-100)],
        )  # fmt: skip
        attempt = place(
            driver, prompt(40), sampling=sampling, max_tokens=9, min_tokens=3, cache_salt="mine",
            adapter="poet", grammar=inference.Grammar(regex="a+"),
        )  # fmt: skip
        assert await attempt.ended() == "finished"
        assert attempt.tokens == tokens_after(prompt(40), 9)
        (asked,) = driver.model.requests
        assert [*asked.token_ids.ids] == prompt(40)
        assert (asked.temperature, asked.sampling.top_k, asked.sampling.seed) == (0.5, 40, 12)
        assert (asked.sampling.top_p, asked.sampling.min_p) == (0.75, 0.25)
        assert asked.decoding.repetition_penalty == 1.25
        assert (asked.decoding.frequency_penalty, asked.decoding.presence_penalty) == (0.5, -0.5)
        assert dict(asked.decoding.logit_bias) == {7: -100.0}
        assert asked.decoding.regex == "a+"
        assert (asked.stopping.max_new_tokens, asked.stopping.min_new_tokens) == (9, 3)
        assert asked.stopping.ignore_eos
        assert asked.response.output_token_ids
        assert not asked.response.output_text
        assert (asked.kv.cache_salt, asked.lora_name) == ("mine", "poet")
        assert not asked.watermarking
        later = place(driver, prompt(5), deadline_ms=10_000.0, max_tokens=1)
        await later.ended()
        assert driver.model.requests[1].priority - asked.priority > 5_000
        await driver.idle()


async def test_a_stop_and_log_probabilities(folder) -> None:
    said = tokens_after(prompt(20), 10)
    async with served(folder) as driver:
        attempt = place(driver, prompt(20), stop_token_ids=[said[2]], max_tokens=9, logprobs=2)
        await attempt.ended()
        assert attempt.tokens == said[:3]
        assert attempt.end.finished.stop_token_id == said[2]
        assert attempt.logprobs[0].logprob == -2.5
        assert [*attempt.logprobs[0].top_ids] == [10, 11]


@pytest.mark.parametrize("stage", ["on its way", "waiting", "decoding"])
async def test_an_abort_at_every_stage_goes_by_control(folder, stage) -> None:
    async with served(folder) as driver:
        model = driver.model
        if stage == "on its way":
            do(model.admit.clear)
        if stage == "waiting":
            do(model.hold.clear)
        model.step_s = 0.002
        attempt = place(driver, prompt(40), max_tokens=10_000)
        if stage == "on its way":
            await until(lambda: model.requests)
        elif stage == "waiting":
            await until(lambda: model.running)
        else:
            await attempt.until(lambda a: len(a.tokens) > 2)
        before = model.aborts
        driver.engine.cancel([attempt.id])
        assert await attempt.ended() == "cancelled"
        await until(lambda: model.aborts > before)
        do(model.admit.set)
        do(model.hold.set)
        await driver.idle()
        await until(lambda: model.running == {})


async def test_a_server_that_started_anew_is_another_one(folder) -> None:
    async with served(folder) as driver:
        driver.service.instance = "second"
        async with asyncio.timeout(20):
            await driver.over.wait()


async def test_cache_events_by_zmq(folder, tmp_path) -> None:
    zmq, msgspec = pytest.importorskip("zmq"), pytest.importorskip("msgspec")
    publisher = zmq.Context.instance().socket(zmq.PUB)
    port = publisher.bind_to_random_port("tcp://127.0.0.1")
    source = control.KvEventSource(
        transport="zmq", endpoint=f"tcp://*:{port}", topic="", data_parallel_rank=0
    )
    async with served(folder, [source]) as driver:
        assert driver.engine.capabilities().cache_events
        event = {
            "type": "BlockStored", "block_hashes": [7], "parent_block_hash": None,
            "token_ids": prompt(BLOCK), "block_size": BLOCK, "medium": "GPU",
        }  # fmt: skip
        number = 0

        def known():
            # Who subscribes late misses what was said before.
            nonlocal number
            payload = msgspec.msgpack.encode([0.0, [event], 0])
            publisher.send_multipart((b"", struct.pack(">Q", number), payload))
            number += 1
            return len(driver.engine._cache) == 1

        await until(known)
    publisher.close()


@pytest.mark.parametrize(
    ("told", "reached"),
    [
        ("tcp://*:5557", "tcp://10.0.0.5:5557"),
        ("tcp://0.0.0.0:5557", "tcp://10.0.0.5:5557"),
        ("tcp://10.0.0.9:5557", "tcp://10.0.0.9:5557"),
        ("ipc:///tmp/events", "ipc:///tmp/events"),
    ],
)
def test_a_publisher_of_any_address_is_at_its_servers(told, reached) -> None:
    assert endpoint(told, "10.0.0.5") == reached
