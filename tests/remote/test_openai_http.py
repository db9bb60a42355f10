"""Servers that speak OpenAI's HTTP alone. What is common to all wires is tested with SMG's."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from engine_harness import running, until
from fake_core import tokens_after
from fake_loop import do, there
from fake_model import BLOCK, BLOCKS, CONTEXT, END, MODEL, FakeModel
from fake_openai import FakeOpenAi, serve

from kvmesh.engine.contract import Stage
from kvmesh.engine.remote import metrics, openai_http
from kvmesh.engine.remote.served import build
from kvmesh.engine.remote.server import Load
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import SettingError, WorkerSettings

GREEDY = wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0)
KINDS = ("vllm", "sglang", "llamacpp")


def prompt(length, seed=0):
    return [(seed * 131 + at * 7) % 1899 + 51 for at in range(length)]


def place(driver, ids, *args, **more):
    more.setdefault("sampling", GREEDY)
    more.setdefault("stop_token_ids", [END])
    return driver.place(ids, *args, **more)


def settings(port, folder, **arguments):
    given = {"server": f"http://127.0.0.1:{port}", "tokenizer": str(folder), **arguments}
    return WorkerSettings(engine="remote", engine_arguments=given)


@asynccontextmanager
async def served(folder, kind="vllm", arguments=None, **more):
    service = FakeOpenAi(FakeModel(), kind, **more)
    server, port = await there(serve(service))
    try:
        given = settings(port, folder, **(arguments or {}))
        built = await asyncio.to_thread(build, given, "w", 1, lambda line: None)
        async with running(built.engine) as driver:
            driver.built, driver.service, driver.server = built, service, server
            driver.model = service.model
            service.paths.clear()
            driver.model.seen.clear()
            driver.model.requests.clear()
            yield driver
    finally:
        do(server.close)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_record_says_what_can_be_known(folder, kind) -> None:
    async with served(folder, kind) as driver:
        record, can = driver.built.model, driver.engine.capabilities()
        assert (record.name, record.context_length) == (MODEL, CONTEXT)
        assert record.vocabulary_size == 2000
        assert [*record.end_of_text_ids] == [END]
        assert can.engine == kind.replace("llamacpp", "llama.cpp")
        # Nothing tells of its cache: routers go by what they sent there.
        assert not can.cache_events
        assert can.block_tokens == BLOCK
        # Slots, of those that say so.
        assert can.max_batch == (4 if kind == "llamacpp" else 0)
        # llama.cpp does not say: by kv_pool_tokens.
        assert can.pool_blocks == (BLOCKS if kind != "llamacpp" else 2048)
        assert can.max_logprobs == {"vllm": 20, "sglang": 0, "llamacpp": 20}[kind]
        assert can.grammars
        assert can.engine_connector == ""


@pytest.mark.parametrize("kind", KINDS)
async def test_streams_come_whole_and_once(folder, kind) -> None:
    async with served(folder, kind) as driver:
        attempts = [place(driver, prompt(40, at), max_tokens=20) for at in range(6)]
        for at, attempt in enumerate(attempts):
            assert await attempt.ended() == "finished"
            assert attempt.tokens == tokens_after(prompt(40, at), 20)
        refused = place(driver, prompt(5), Stage.PREFILL)
        assert await refused.ended() == "refused"
        assert "no KV connector" in refused.opening.refused.message
        await driver.idle()


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_cached_is_said_at_the_end_and_teaches_nothing(folder, kind) -> None:
    async with served(folder, kind) as driver:
        driver.model.cached = 32
        attempt = place(driver, prompt(40), max_tokens=5)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == tokens_after(prompt(40), 5)
        timings = attempt.end.timings
        assert (timings.cached_tokens, timings.computed_tokens) == (32, 8)
        assert [s.prefill_tokens for s in driver.samples if s.prefill_tokens] == []
        # A server that says nothing of it is taken to have computed all.
        driver.model.cached = 0
        attempt = place(driver, prompt(40), max_tokens=5)
        await attempt.ended()
        timings = attempt.end.timings
        assert (timings.cached_tokens, timings.computed_tokens) == (0, 40)
        assert [s.prefill_tokens for s in driver.samples if s.prefill_tokens] == []


async def test_each_life_is_timed_with_prompts_that_no_cache_has(folder) -> None:
    began = []
    for _ in range(2):
        async with served(folder) as driver:
            began.append({asked[:BLOCK] for asked in driver.model.prompts if len(asked) > 1})
    assert len(began[0]) > 8
    assert not began[0] & began[1]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_id_ends_the_output_also_where_the_server_does_not(folder, kind) -> None:
    said = tokens_after(prompt(20), 10)
    async with served(folder, kind) as driver:
        attempt = place(driver, prompt(20), stop_token_ids=[said[6], END], max_tokens=16)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == said[:7]
        assert attempt.end.finished.reason == inference.FINISH_REASON_STOP
        assert attempt.end.finished.stop_token_id == said[6]
        await driver.idle()
        await until(lambda: driver.model.running == {})


@pytest.mark.parametrize("ends_itself", [True, False])
async def test_where_llama_cpp_ends_by_itself_its_usage_is_waited_for(folder, ends_itself) -> None:
    said = tokens_after(prompt(40), 10)
    async with served(folder, "llamacpp") as driver:
        driver.model.cached = 32
        if ends_itself:
            driver.service.ends = (said[6],)
        attempt = place(driver, prompt(40), stop_token_ids=[said[6], END], max_tokens=16)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == said[:7]
        assert attempt.end.finished.stop_token_id == said[6]
        # Where it goes on, nothing tells of it before its own end.
        assert attempt.end.timings.cached_tokens == (32 if ends_itself else 0)
        await driver.idle()


def kept_back(service, place, many, text, ids) -> None:
    """llama.cpp tells the token at a place alone of a character that it ends, and its ids."""
    service.kept_back = {place: (many, text)}
    service.spelling = {text: ids}


async def test_what_llama_cpp_keeps_back_of_a_character_is_found_by_its_text(folder) -> None:
    said = tokens_after(prompt(40), 8)
    async with served(folder, "llamacpp") as driver:
        # The same tokens; fewer of the same text; bytes that are no character.
        for text, ids, whole in (
            ("🙂", said[1:4], said),
            ("é", [700, 701], [said[0], 700, 701, *said[4:]]),
            ("\ufffd\ufffd", [700, 701, 702, 703], [said[0], *said[3:]]),
        ):
            kept_back(driver.service, 3, 2, text, ids)
            attempt = place(driver, prompt(40), max_tokens=8)
            assert await attempt.ended() == "finished"
            assert attempt.tokens == whole
            assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH
        assert driver.service.paths.count("/tokenize") == 3
        await driver.idle()


@pytest.mark.parametrize(
    ("given", "ids", "text", "retryable"),
    [
        ({}, [700, 701, 702, 703], "kept back 2 tokens, of a text that is 4", True),
        ({"logprobs": 1}, [700, 701, 702], "no log-probabilities of characters", False),
    ],
)
async def test_what_llama_cpp_keeps_back_and_cannot_be_found_fails_the_request(
    folder, given, ids, text, retryable
) -> None:
    async with served(folder, "llamacpp") as driver:
        kept_back(driver.service, 3, 2, "🙂", ids)
        attempt = place(driver, prompt(40), max_tokens=8, **given)
        assert await attempt.ended() == "failed"
        assert text in attempt.end.failed.message
        assert attempt.end.failed.retryable == retryable
        await driver.idle()


async def test_a_character_that_the_end_cut_off_is_left_out(folder) -> None:
    said = tokens_after(prompt(40), 8)
    async with served(folder, "llamacpp") as driver:
        kept_back(driver.service, 9, 3, "never whole", [])
        attempt = place(driver, prompt(40), max_tokens=8)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == said[:6]
        assert "/tokenize" not in driver.service.paths


async def test_a_request_to_vllm_says_what_was_asked(folder) -> None:
    async with served(folder, arguments={"priorities": "true"}) as driver:
        sampling = wire.ResolvedSampling(
            temperature=0.5, top_k=40, top_p=0.75, min_p=0.25, repetition_penalty=1.25,
            frequency_penalty=0.5, presence_penalty=-0.5, seed=12,
            logit_bias=[inference.LogitBias(token_id=7, bias=-100)],
        )  # fmt: skip
        attempt = place(
            driver, prompt(5), sampling=sampling, max_tokens=9, min_tokens=3, logprobs=2,
            cache_salt="mine", grammar=inference.Grammar(json_schema="{}"),
        )  # fmt: skip
        assert await attempt.ended() == "finished"
        (asked,) = driver.model.requests
        assert asked.pop("request_id")
        assert asked.pop("priority") > 0
        assert asked == {
            "model": MODEL, "prompt": prompt(5), "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True,
            "temperature": 0.5, "top_k": 40, "top_p": 0.75, "min_p": 0.25,
            "repetition_penalty": 1.25, "frequency_penalty": 0.5, "presence_penalty": -0.5,
            "seed": 12, "logit_bias": {"7": -100.0}, "max_tokens": 9, "min_tokens": 3,
            "stop_token_ids": [END], "ignore_eos": True, "skip_special_tokens": False,
            "logprobs": 2, "return_tokens_as_token_ids": True, "cache_salt": "mine",
            "structured_outputs": {"json": "{}"},
        }  # fmt: skip
        assert attempt.logprobs[0].logprob == -2.5
        assert [*attempt.logprobs[0].top_ids] == [10, 11]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_priorities_are_sent_where_the_operator_says_that_they_count(folder, kind) -> None:
    for switch, sent in (("false", False), ("true", True)):
        async with served(folder, kind, arguments={"priorities": switch}) as driver:
            assert await place(driver, prompt(5), max_tokens=1).ended() == "finished"
            assert ("priority" in driver.model.requests[0]) == sent


async def test_a_request_to_sglang_has_its_own_names(folder) -> None:
    async with served(folder, "sglang") as driver:
        await place(
            driver, prompt(5), max_tokens=1, grammar=inference.Grammar(ebnf="root"),
        ).ended()  # fmt: skip
        (asked,) = driver.model.requests
        assert asked["rid"]
        assert (asked["top_k"], asked["ebnf"]) == (-1, "root")


@pytest.mark.parametrize(
    ("kind", "seeded", "deterministic"),
    [("sglang", True, True), ("sglang", True, False), ("vllm", True, False), ("vllm", False, True)],
)
async def test_a_seed_is_sent_where_the_server_draws_by_it(
    folder, kind, seeded, deterministic
) -> None:
    works = seeded and (deterministic or kind != "sglang")
    given = {"seeded": str(seeded).lower()}
    async with served(folder, kind, arguments=given, deterministic=deterministic) as driver:
        warm = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 5}
        drawn = place(driver, prompt(5), max_tokens=1, sampling=wire.ResolvedSampling(**warm))
        assert await drawn.ended() == "finished"
        given = wire.ResolvedSampling(**warm, seed_given=True)
        attempt = place(driver, prompt(5), max_tokens=1, sampling=given)
        assert await attempt.ended() == ("finished" if works else "refused")
        seeds = [asked.get("seed") for asked in driver.model.requests]
        assert seeds == ([5, 5] if works else [None])
        if not works:
            assert attempt.opening.refused.field == "sampling.seed"


async def test_llama_cpp_is_sent_json_schemas(folder) -> None:
    async with served(folder, "llamacpp") as driver:
        for grammar, schema in (
            (inference.Grammar(json_schema='{"type": "string"}'), {"type": "string"}),
            (inference.Grammar(json_object=True), {"type": "object"}),
        ):
            assert await place(driver, prompt(5), max_tokens=1, grammar=grammar).ended()
            assert driver.model.requests.pop()["json_schema"] == schema
        bad = place(driver, prompt(5), grammar=inference.Grammar(json_schema="{"))
        assert await bad.ended() == "failed"
        assert not bad.end.failed.retryable
        assert "the schema is no JSON" in bad.end.failed.message


@pytest.mark.parametrize(
    ("kind", "given", "field"),
    [
        ("llamacpp", {"cache_salt": "mine"}, "hints.cache_salt"),
        ("llamacpp", {"min_tokens": 3}, "stopping.min_tokens"),
        ("llamacpp", {"stop_token_ids": []}, "stopping.ignore_end_of_text"),
        ("llamacpp", {"grammar": inference.Grammar(regex="a")}, "grammar"),
        (
            "llamacpp",
            {"sampling": wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.5)},
            "sampling.repetition_penalty",
        ),
        ("vllm", {"adapter": "poet"}, "model"),
    ],
)
async def test_what_a_server_lacks_is_refused_by_name(folder, kind, given, field) -> None:
    async with served(folder, kind) as driver:
        attempt = place(driver, prompt(5), **given)
        assert await attempt.ended() == "refused"
        assert attempt.opening.refused.field == field
        assert driver.model.requests == []


@pytest.mark.parametrize(
    ("kind", "how", "cached"),
    [
        ("llamacpp", "refuse", None),
        ("llamacpp", "uncached", False),
        ("llamacpp", "shared", True),
        ("vllm", "refuse", True),
        ("vllm", "shared", True),
    ],
)
async def test_salted_prompts_are_served_as_the_operator_said(folder, kind, how, cached) -> None:
    async with served(folder, kind, arguments={"salted_prompts": how}) as driver:
        can = driver.engine.capabilities()
        # What refuses salts says so, and is sent none.
        assert can.no_cache_salt == (cached is None)
        # Where no prompt finds anything, an index without entries is right.
        assert can.cache_events == (how == "uncached")
        salted = place(driver, prompt(40), max_tokens=3, cache_salt="mine")
        assert await salted.ended() == ("refused" if cached is None else "finished")
        assert await place(driver, prompt(40), max_tokens=3).ended() == "finished"
        requests = driver.model.requests
        assert len(requests) == (1 if cached is None else 2)
        if kind == "llamacpp":
            # Also those without a salt: they would find what a salted one has left.
            assert [asked["cache_prompt"] for asked in requests] == (
                [True] if cached is None else [cached, cached]
            )
            assert not any("cache_salt" in asked for asked in requests)
        else:
            assert [asked.get("cache_salt") for asked in requests] == ["mine", None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["waiting", "decoding"])
async def test_a_cancel_ends_the_request_there(folder, kind, stage) -> None:
    async with served(folder, kind) as driver:
        model = driver.model
        if stage == "waiting":
            do(model.hold.clear)
        model.step_s = 0.002
        attempt = place(driver, prompt(40), max_tokens=10_000)
        if stage == "waiting":
            await until(lambda: model.running)
        else:
            await attempt.until(lambda a: len(a.tokens) > 2)
        driver.engine.cancel([attempt.id])
        assert await attempt.ended() == "cancelled"
        await driver.idle()
        await until(lambda: model.running == {})
        calls = {"vllm": "/inference/v1/abort_requests", "sglang": "/abort_request"}
        assert (model.aborts > 0) == (kind in calls)
        assert (calls.get(kind) in driver.service.paths) == (kind in calls)


async def test_without_an_abort_call_the_dropped_stream_does(folder) -> None:
    async with served(folder, can_abort=False) as driver:
        driver.model.step_s = 0.002
        for _ in range(2):
            attempt = place(driver, prompt(40), max_tokens=10_000)
            await attempt.until(lambda a: a.tokens)
            driver.engine.cancel([attempt.id])
            assert await attempt.ended() == "cancelled"
            await driver.idle()
        await until(lambda: driver.model.running == {})
        # It is asked for once, and not again.
        assert driver.service.paths.count("/inference/v1/abort_requests") == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_connection_serves_one_request_after_the_other(folder, kind) -> None:
    async with served(folder, kind) as driver:
        driver.service.completed_on.clear()
        for at in range(10):
            assert await place(driver, prompt(20, at), max_tokens=3).ended() == "finished"
            await driver.idle()
        # One may be in use still, to ask how the server is or to read an end.
        assert len(driver.service.completed_on) == 10
        assert len(set(driver.service.completed_on)) <= 5


async def test_an_answer_that_does_not_end_costs_its_connection_alone(folder, monkeypatch) -> None:
    monkeypatch.setattr(openai_http, "_REST_S", 0.05)
    async with served(folder) as driver:
        driver.service.lingers = True
        attempt = place(driver, prompt(20), max_tokens=3)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == tokens_after(prompt(20), 3)
        await driver.idle()
        await until(lambda: driver.service.closed == 1)


@pytest.mark.parametrize(
    ("status", "retryable", "code"), [(400, False, 3), (404, False, 3), (503, True, 14)]
)
async def test_a_request_that_fails_leaves_the_server(folder, status, retryable, code) -> None:
    async with served(folder) as driver:
        driver.model.fail = Exception(status, "as the test wants")
        attempt = place(driver, prompt(5))
        assert await attempt.ended() == "failed"
        failed = attempt.end.failed
        assert (failed.code, failed.retryable) == (code, retryable)
        assert "as the test wants" in failed.message
        driver.model.fail = None
        assert await place(driver, prompt(5), max_tokens=1).ended() == "finished"


async def test_with_the_server_the_engine_ends(folder) -> None:
    async with served(folder) as driver:
        driver.model.step_s = 0.002
        attempt = place(driver, prompt(30), max_tokens=10_000)
        await attempt.until(lambda a: len(a.tokens) > 2)
        driver.service.kind = "llamacpp"
        driver.service.key = "changed"
        async with asyncio.timeout(20):
            await driver.over.wait()


async def test_load_is_what_prometheus_is_told(folder) -> None:
    async with served(folder) as driver:
        driver.model.step_s = 0.002
        driver.model.kept["another client's"] = 100
        attempt = place(driver, prompt(160), max_tokens=10_000)
        await attempt.until(lambda a: len(a.tokens) > 2)
        await until(lambda: driver.engine.load().kv.pinned >= 80)
        driver.engine.cancel([attempt.id])
        await driver.idle()


async def test_without_figures_our_own_requests_are_counted(folder) -> None:
    async with served(folder, "llamacpp") as driver:
        driver.model.step_s = 0.002
        attempt = place(driver, prompt(160), max_tokens=10_000)
        await attempt.until(lambda a: len(a.tokens) > 2)
        await until(lambda: driver.engine.load().kv.running >= 10)
        assert driver.engine.load().kv.pinned == 0
        driver.engine.cancel([attempt.id])
        await driver.idle()
        await until(lambda: driver.engine.load().kv.running == 0)


async def test_what_cannot_be_attached_says_why(folder, tmp_path) -> None:
    async def refused(kind, text, port_settings, **more):
        server, port = await there(serve(FakeOpenAi(FakeModel(), kind, **more)))
        with pytest.raises(SettingError, match=text):
            await asyncio.to_thread(build, port_settings(port), "w", 1, lambda line: None)
        do(server.close)

    plain = lambda port: settings(port, folder)  # noqa: E731
    await refused("other", "tells no token ids", plain)
    await refused("vllm", "set server_key", plain, key="secret")
    await refused("vllm", "the server's are fake-model",
                  lambda port: settings(port, folder, model="another"))  # fmt: skip
    await refused("vllm", "does not send its tokeniser",
                  lambda port: settings(port, "", tokenizer=""))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_what_ends_a_text_is_known_or_the_server_ends_it(folder, kind) -> None:
    (folder / "generation_config.json").unlink()
    # The tokeniser's own eos_token.
    async with served(folder, kind) as driver:
        assert [*driver.built.model.end_of_text_ids] == [END]
    (folder / "tokenizer_config.json").write_text("{}")
    if kind == "llamacpp":
        async with served(folder, kind) as driver:
            assert [*driver.built.model.end_of_text_ids] == []
        return
    with pytest.raises(SettingError, match=r"tokenizer: .*add eos_token_id to generation_config"):
        async with served(folder, kind):
            pass


async def test_a_key_is_sent(folder) -> None:
    async with served(folder, key="secret", arguments={"server_key": "secret"}) as driver:
        assert await place(driver, prompt(5), max_tokens=1).ended() == "finished"


def test_metrics_of_several_engines_are_taken_together() -> None:
    text = (
        "# HELP vllm:num_requests_running Running\n"
        'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 3.0\n'
        'vllm:num_requests_waiting{engine="0"} 1.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="1"} 0.25\n'
        "broken line\nnot:a_number x\n"
    )
    assert metrics.load(text) == Load(5, 1, 0.375)
    assert metrics.load("llamacpp:requests_processing 1\n") is None
    assert metrics.pool('vllm:cache_config_info{num_gpu_blocks="None",block_size="16"} 1') == (0, 0)
