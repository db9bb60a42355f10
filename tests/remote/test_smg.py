"""SMG's servicer as a server: every call, an abort at every stage, ends of all kinds."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from engine_harness import apply, chains_of, running, until
from fake_core import tokens_after
from fake_loop import do, there
from fake_model import BLOCK, BLOCKS, CONTEXT, END, MODEL, VOCABULARY, FakeModel, files
from fake_smg import FakeSmg, serve

from kvmesh.engine.contract import Stage
from kvmesh.engine.remote import smg
from kvmesh.engine.remote.served import build
from kvmesh.engine.remote.server import LostError
from kvmesh.index import chain_values, namespace_root
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.vllm_wire import smg_common_pb2 as common
from kvmesh.worker.settings import SettingError, WorkerSettings
from kvmesh.worker.tokenizer_files import TokenizerFiles

GREEDY = wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0)


def prompt(length, seed=0):
    return [(seed * 131 + at * 7) % 1899 + 51 for at in range(length)]


def place(driver, ids, *args, **more):
    more.setdefault("sampling", GREEDY)
    return driver.place(ids, *args, **more)


def settings(port, role="both", **arguments):
    given = {"server": f"vllm://127.0.0.1:{port}", **arguments}
    return WorkerSettings(role=role, engine="remote", engine_arguments=given)


@asynccontextmanager
async def served(role="both", connector="", arguments=None, **more):
    """A server, and its driver."""
    service = FakeSmg(FakeModel(connector=connector), **more)
    server, port = await there(serve(service))
    try:
        given = settings(port, role, **(arguments or {}))
        built = await asyncio.to_thread(build, given, "w", 1, lambda line: None)
        async with running(built.engine) as driver:
            driver.built, driver.service, driver.server = built, service, server
            driver.model = service.model
            driver.model.seen.clear()
            driver.model.requests.clear()
            yield driver
    finally:
        await there(server.stop(None))


async def test_the_record_says_what_the_server_says() -> None:
    async with served() as driver:
        record, can = driver.built.model, driver.engine.capabilities()
        assert (record.name, record.context_length) == (MODEL, CONTEXT)
        assert record.vocabulary_size == VOCABULARY
        assert [*record.end_of_text_ids] == [END]
        assert len(record.digest) == 64
        known = {n: c for n, c in files().items() if n != "generation_config.json"}
        assert driver.built.tokenizer == TokenizerFiles.of(known)
        assert (can.block_tokens, can.pool_blocks, can.max_batch) == (BLOCK, BLOCKS, 64)
        assert can.cache_events
        assert can.grammars
        assert can.engine_connector == ""
        assert can.kv.dtype == "float32"
        # What a server's wire cannot promise.
        assert not can.reproducible
        assert not can.penalties_over_continuation
        assert not can.streamed_hand_off
        assert driver.engine.step_model().a_ms >= 0


async def test_streams_come_whole_and_once() -> None:
    async with served() as driver:
        attempts = [place(driver, prompt(40, at), max_tokens=20) for at in range(6)]
        for at, attempt in enumerate(attempts):
            assert await attempt.ended() == "finished"
            assert attempt.tokens == tokens_after(prompt(40, at), 20)
            assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH
            assert attempt.end.timings.computed_tokens == 40
            assert 0 < attempt.end.timings.prefill_ms < 60_000
        await driver.idle()


async def test_what_was_cached_is_known_with_the_first_token() -> None:
    async with served() as driver:
        driver.model.cached = 32
        attempt = place(driver, prompt(40), max_tokens=5)
        assert await attempt.ended() == "finished"
        timings = attempt.end.timings
        assert (timings.cached_tokens, timings.computed_tokens) == (32, 8)
        # So what it took teaches what eight tokens take.
        assert {s.prefill_tokens for s in driver.samples if s.prefill_tokens} <= {8}


async def test_a_request_says_what_was_asked() -> None:
    async with served() as driver:
        sampling = wire.ResolvedSampling(
            temperature=0.5, top_k=40, top_p=0.75, min_p=0.25, repetition_penalty=1.25,
            frequency_penalty=0.5, presence_penalty=-0.5, seed=(1 << 40) + 12,
            logit_bias=[inference.LogitBias(token_id=7, bias=-100)],
        )  # fmt: skip
        attempt = place(
            driver, prompt(5), sampling=sampling, max_tokens=9, min_tokens=3,
            stop_token_ids=[END], grammar=inference.Grammar(json_schema="{}"),
        )  # fmt: skip
        await attempt.ended()
        (asked,) = driver.model.requests
        given = asked.sampling_params
        assert [*asked.tokenized.input_ids] == prompt(5)
        assert asked.stream
        assert (given.temperature, given.top_k, given.top_p, given.min_p) == (0.5, 40, 0.75, 0.25)
        assert given.repetition_penalty == 1.25
        assert (given.frequency_penalty, given.presence_penalty) == (0.5, -0.5)
        assert (given.max_tokens, given.min_tokens, given.seed) == (9, 3, 12)
        assert given.ignore_eos
        assert [*given.stop_token_ids] == [END]
        assert dict(given.logit_bias) == {7: -100.0}
        assert given.json_schema == "{}"
        assert not given.HasField("logprobs")


async def test_one_of_several_ranks_can_be_meant() -> None:
    async with served(arguments={"data_parallel_rank": "1"}) as driver:
        await place(driver, prompt(5), max_tokens=1).ended()
        assert driver.model.requests[0].data_parallel_rank == 1
        # Nothing is known of a rank that the server does not tell of.
        assert driver.engine.capabilities().pool_blocks == 2048


async def test_a_stop_id_ends_the_output_and_is_told() -> None:
    said = tokens_after(prompt(20), 10)
    async with served() as driver:
        attempt = place(driver, prompt(20), stop_token_ids=[said[6]], max_tokens=16)
        await attempt.ended()
        assert attempt.tokens == said[:7]
        assert attempt.end.finished.reason == inference.FINISH_REASON_STOP
        assert attempt.end.finished.stop_token_id == said[6]


async def test_log_probabilities_leave_out_what_was_told_beside_them() -> None:
    async with served() as driver:
        attempt = place(driver, prompt(20), max_tokens=2, logprobs=2)
        await attempt.ended()
        # One more is asked for: the servicer counts the token that was drawn.
        assert driver.model.requests[0].sampling_params.logprobs == 3
        assert [entry.logprob for entry in attempt.logprobs] == [-2.5, -2.5]
        assert [*attempt.logprobs[0].top_ids] == [10, 11]
        assert [*attempt.logprobs[0].top_logprobs] == [-1.0, -2.0]
        alone = place(driver, prompt(20), max_tokens=1, logprobs=0)
        await alone.ended()
        assert alone.logprobs == [inference.TokenLogprobs(logprob=-2.5)]


@pytest.mark.parametrize(
    ("given", "field", "text"),
    [
        ({"cache_salt": "mine"}, "hints.cache_salt", "no cache salt"),
        ({"adapter": "poet"}, "model", "no adapter 'poet'"),
        ({"sampling": wire.ResolvedSampling(temperature=9)}, "sampling.temperature", "up to 2"),
        ({"ids": [VOCABULARY]}, "", "under 2000"),
        ({"ids": prompt(CONTEXT)}, "", "the limit is 4096"),
    ],
)
async def test_what_the_wire_cannot_carry_is_refused_by_name(given, field, text) -> None:
    async with served() as driver:
        attempt = place(driver, given.pop("ids", prompt(5)), **given)
        assert await attempt.ended() == "refused"
        assert attempt.opening.refused.reason == wire.REFUSAL_REASON_UNSUPPORTED
        assert attempt.opening.refused.field == field
        assert text in attempt.opening.refused.message
        assert driver.model.requests == []


# -- aborts -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["on its way", "waiting", "decoding", "twice"])
async def test_an_abort_at_every_stage_reaches_the_server(stage) -> None:
    async with served() as driver:
        model = driver.model
        if stage == "on its way":
            # The call is there and not read: an abort now is of nothing.
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
        if stage == "twice":
            driver.engine.cancel([attempt.id])
        assert await attempt.ended() == "cancelled"
        await until(lambda: model.aborts > before)
        do(model.admit.set)
        do(model.hold.set)
        await driver.idle()
        # It was told by name: the server keeps what only its stream has left.
        # What comes late on its own thread: nothing runs before it is added, too.
        await until(lambda: len(model.seen) >= 2 and model.running == {})
        assert [kind for kind, _ in model.seen] == ["add", "abort"]


async def test_closing_the_engine_aborts_what_runs() -> None:
    async with served() as driver:
        driver.model.step_s = 0.002
        attempt = place(driver, prompt(40), max_tokens=10_000)
        await attempt.until(lambda a: a.tokens)
        model = driver.model
        await driver.engine.close()
        assert model.running == {}
        assert model.aborts >= 1


# -- hand-offs --------------------------------------------------------------------


async def test_a_prompt_is_handed_off_by_the_servers_connector() -> None:
    async with (
        served("prefill", "NixlConnector") as prefill,
        served("decode", "NixlConnector") as decode,
    ):
        assert prefill.engine.capabilities().engine_connector == "NixlConnector"
        first = place(prefill, prompt(100), Stage.PREFILL)
        assert await first.ended() == "handed_off"
        assert first.tokens == []
        hand_off = wire.HandOff(engine=first.end.handed_off.engine)
        assert [*prefill.model.kept.values()] == [7]
        attempt = place(decode, prompt(100), Stage.DECODE, hand_off=hand_off, max_tokens=6)
        assert await attempt.ended() == "finished"
        assert attempt.tokens == tokens_after(prompt(100), 6)
        (asked,) = decode.model.requests
        assert '"do_remote_prefill": true' in asked.kv_transfer_params_json


async def test_a_cancelled_decode_is_aborted_after_the_server_has_it() -> None:
    async with (
        served("prefill", "NixlConnector") as prefill,
        served("decode", "NixlConnector") as decode,
    ):
        first = place(prefill, prompt(100), Stage.PREFILL)
        await first.ended()
        (name,) = prefill.model.kept
        decode.model.kept = {name: 7}
        do(decode.model.hold.clear)
        hand_off = wire.HandOff(engine=first.end.handed_off.engine)
        attempt = place(decode, prompt(100), Stage.DECODE, hand_off=hand_off)
        decode.engine.cancel([attempt.id])
        assert await attempt.ended() == "cancelled"
        # The router hears of the end at once, the server a little later: it could be done by then.
        await until(lambda: len(decode.model.seen) >= 2)
        do(decode.model.hold.set)
        # Else its connector would never tell the sender that the blocks can go.
        await until(lambda: decode.model.kept == {})
        await decode.idle()
        assert [kind for kind, _ in decode.model.seen] == ["add", "abort"]


async def test_tenants_share_its_cache_where_the_operator_said_so() -> None:
    async with served() as driver:
        assert driver.engine.capabilities().no_cache_salt
    async with served(arguments={"salted_prompts": "shared"}) as driver:
        can = driver.engine.capabilities()
        # By its events no router would find salted prompts there: they go by what they sent.
        assert not (can.no_cache_salt)
        assert not (can.cache_events)
        attempt = place(driver, prompt(40), max_tokens=3, cache_salt="mine")
        assert await attempt.ended() == "finished"
        assert attempt.tokens == tokens_after(prompt(40), 3)
    server, port = await there(serve(FakeSmg(FakeModel())))
    for how, text in (
        ("uncached", "'uncached'; allowed are refuse and shared"),
        ("never", "salted_prompts is 'never'; allowed are refuse, uncached, shared"),
    ):
        given = settings(port, salted_prompts=how)
        with pytest.raises(SettingError, match=text):
            await asyncio.to_thread(build, given, "w", 1, lambda line: None)
    await there(server.stop(None))


async def test_roles_need_a_connector() -> None:
    server, port = await there(serve(FakeSmg(FakeModel())))
    with pytest.raises(SettingError, match="role is 'prefill'; allowed is both"):
        await asyncio.to_thread(build, settings(port, "prefill"), "w", 1, lambda line: None)
    await there(server.stop(None))


# -- load and cache ---------------------------------------------------------------


async def test_load_counts_our_requests_and_others_blocks() -> None:
    async with served() as driver:
        driver.model.step_s = 0.002
        driver.model.kept["another client's"] = 100
        attempt = place(driver, prompt(160), max_tokens=10_000)
        await attempt.until(lambda a: len(a.tokens) > 2)
        share = driver.engine.load().shares["router"]
        assert (share.decoding, share.queued) == (1, 0)
        await until(lambda: driver.engine.load().kv.running >= 10)
        room = driver.engine.load().kv
        assert 80 <= room.pinned <= 110
        driver.engine.cancel([attempt.id])
        await driver.idle()
        assert driver.engine.residue().held_blocks == 0


async def test_cache_events_name_what_the_router_names() -> None:
    async with served() as driver:
        await until(lambda: driver.model.feeds)
        ids = prompt(70)
        await place(driver, ids, max_tokens=1).ended()
        root = namespace_root(driver.built.model.digest)
        expected = {int(value) for value in chain_values(root, ids[:64])}
        chains: set[int] = set()
        await until(lambda: expected <= {*chains_of(driver.engine.snapshot())})
        for batch in driver.batches:
            chains = {*chains} if _applied(chains, batch) else set()
        assert expected <= chains
        # A second turn finds what the first one left.
        second = place(driver, [*ids, *prompt(9, 1)], max_tokens=1)
        opening = await second.opened()
        assert opening.reserved.tokens_held == 64
        await second.ended()
        do(driver.model.clear)
        await until(lambda: not chains_of(driver.engine.snapshot()))


def _applied(chains, batch) -> bool:
    """Whether the batch leaves what is known."""
    if any(change.kind == 2 for change in batch.changes):
        chains.clear()
        kept = [change for change in batch.changes if change.kind != 2]
        batch.changes = kept
    apply(chains, batch)
    return True


async def test_a_feed_that_ends_is_taken_up_anew_and_what_was_known_forgotten() -> None:
    async with served() as driver:
        await until(lambda: driver.model.feeds)
        await place(driver, prompt(70), max_tokens=1).ended()
        await until(lambda: chains_of(driver.engine.snapshot()))
        (feed,) = driver.model.feeds
        do(feed.put_nowait, ("end", ()))
        await until(lambda: not chains_of(driver.engine.snapshot()))
        await until(lambda: driver.model.feeds and driver.model.feeds != [feed])
        await place(driver, prompt(70, 2), max_tokens=1).ended()
        await until(lambda: len(chains_of(driver.engine.snapshot())) == 4)


async def test_a_feed_that_cannot_be_read_is_taken_up_anew(monkeypatch, caplog) -> None:
    async with served() as driver:
        await until(lambda: driver.model.feeds)
        (feed,) = driver.model.feeds
        await place(driver, prompt(70), max_tokens=1).ended()
        await until(lambda: chains_of(driver.engine.snapshot()))

        def unreadable(event):
            monkeypatch.undo()
            raise ValueError("no such event")

        monkeypatch.setattr(smg, "cache_event", unreadable)
        await place(driver, prompt(70, 1), max_tokens=1).ended()
        await until(lambda: not chains_of(driver.engine.snapshot()))
        await until(lambda: driver.model.feeds and driver.model.feeds != [feed])
        await place(driver, prompt(70, 2), max_tokens=1).ended()
        await until(lambda: len(chains_of(driver.engine.snapshot())) == 4)
    assert "no such event" in caplog.text


@pytest.mark.parametrize(
    "event",
    [
        common.KvCacheEvent(stored=common.KvBlocksStored(tier=common.KV_CACHE_TIER_HOST)),
        common.KvCacheEvent(removed=common.KvBlocksRemoved(tier=common.KV_CACHE_TIER_DISK)),
        common.KvCacheEvent(stored=common.KvBlocksStored(locality=common.KV_CACHE_LOCALITY_REMOTE)),
        common.KvCacheEvent(),
    ],
)
def test_blocks_that_do_not_lie_on_the_device_are_left_out(event) -> None:
    assert [*smg.cache_event(event)] == []


def test_a_blocks_keys_are_told_as_vllm_has_them() -> None:
    block = common.KvBlock(block_hash=-1, token_ids=range(BLOCK), block_size=BLOCK)
    block.extra_keys.add(text="salt")
    block.extra_keys.add(multimodal=common.KvMultimodalKey(identifier="image", offset=3))
    stored = common.KvBlocksStored(blocks=[block], lora_name="poet", group_idx=2)
    (event,) = smg.cache_event(common.KvCacheEvent(stored=stored))
    assert event["block_hashes"] == [2**64 - 1]
    assert event["parent_block_hash"] is None
    assert event["extra_keys"] == [["salt", ("image", 3)]]
    assert (event["lora_name"], event["group_idx"]) == ("poet", 2)


async def test_a_server_without_cache_events_has_an_approximate_index() -> None:
    async with served(events=False) as driver:
        assert not driver.engine.capabilities().cache_events
        assert await place(driver, prompt(70), max_tokens=1).ended() == "finished"
        assert not driver.batches or all(c.kind == 2 for b in driver.batches for c in b.changes)


# -- failures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "retryable", "told"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, False, 3),
        (grpc.StatusCode.INTERNAL, True, 14),
        (grpc.StatusCode.UNAVAILABLE, True, 14),
    ],
)
async def test_a_request_that_fails_leaves_the_others(code, retryable, told) -> None:
    async with served() as driver:
        driver.model.step_s = 0.002
        other = place(driver, prompt(30), max_tokens=10_000)
        await other.until(lambda a: a.tokens)
        driver.model.fail = Exception(code, "as the test wants")
        attempt = place(driver, prompt(5))
        assert await attempt.ended() == "failed"
        failed = attempt.end.failed
        assert (failed.code, failed.retryable) == (told, retryable)
        assert "as the test wants" in failed.message
        driver.engine.cancel([other.id])
        assert await other.ended() == "cancelled"
        await driver.idle()


@pytest.mark.parametrize("how", ["gone", "not well", "another model"])
async def test_with_the_server_the_engine_ends(how) -> None:
    async with served() as driver:
        driver.model.step_s = 0.002
        attempt = place(driver, prompt(30), max_tokens=10_000)
        await attempt.until(lambda a: len(a.tokens) > 2)
        if how == "gone":
            await there(driver.server.stop(None))
        elif how == "not well":
            driver.service.healthy = False
        else:
            driver.service.name = "another"
        async with asyncio.timeout(20):
            await driver.over.wait()
        # What ran is the session's to lose: routers then go on elsewhere.
        assert attempt.end is None


async def test_a_server_that_is_not_there_is_waited_for() -> None:
    server, port = await there(serve(FakeSmg(FakeModel())))
    await there(server.stop(None))
    with pytest.raises(LostError, match=f"127.0.0.1:{port}"):
        await asyncio.to_thread(build, settings(port), "w", 1, lambda line: None)


async def test_without_a_tokenizer_it_says_what_to_give(tmp_path) -> None:
    server, port = await there(serve(FakeSmg(FakeModel(), tokenizer=False)))
    with pytest.raises(SettingError, match="does not send its tokeniser"):
        await asyncio.to_thread(build, settings(port), "w", 1, lambda line: None)
    given = settings(port, tokenizer=str(tmp_path))
    with pytest.raises(SettingError, match=r"no tokenizer\.json"):
        await asyncio.to_thread(build, given, "w", 1, lambda line: None)
    for name, content in files().items():
        (tmp_path / name).write_bytes(content)
    built = await asyncio.to_thread(build, given, "w", 1, lambda line: None)
    assert [*built.model.end_of_text_ids] == [END]
    await built.engine.close()
    await there(server.stop(None))


async def test_a_server_that_stands_still_shows_in_the_age_of_its_step() -> None:
    async with served() as driver:
        model, engine = driver.model, driver.engine
        model.step_s = 0.002
        do(model.hold.clear)
        attempt = place(driver, prompt(30), max_tokens=10_000)
        await until(lambda: engine.load().step_age_ms > 50)
        # It may be behind others' prompts: no router gives it up in seconds.
        assert engine.load().step_predicted_ms >= 7_500
        do(model.hold.set)
        await attempt.until(lambda a: len(a.tokens) > 5)
        do(model.hold.clear)
        await until(lambda: engine.load().step_age_ms > 200)
        assert engine.load().step_predicted_ms < 7_500
        do(model.hold.set)
        driver.engine.cancel([attempt.id])
        await driver.idle()
        assert engine.load().step_age_ms == 0
