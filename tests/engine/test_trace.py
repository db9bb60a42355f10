"""What a request is told of its way through an engine."""

import asyncio
import time

import pytest
from engine_harness import mesh_from, prompt, running, sim, until

from kvmesh.engine.contract import Stage
from kvmesh.engine.core.trace import MAX_SPANS, StepLog, Trace
from kvmesh.v1 import worker_pb2 as wire


def spans(attempt, name):
    return [span for span in attempt.end.timings.trace if span.name == name]


async def test_only_who_asks_gets_spans() -> None:
    async with running(sim()) as driver:
        attempt = driver.place(prompt(100))
        await attempt.ended()
        assert not attempt.end.timings.trace


async def test_a_whole_request_is_told_from_queue_to_decode() -> None:
    async with running(sim()) as driver:
        attempt = driver.place(prompt(1_000), trace=True, max_tokens=9)
        await attempt.ended()
        assert len(spans(attempt, "worker_queue")) == 1
        assert sum(span.tokens for span in spans(attempt, "prefill_chunk")) == 1_000
        (decode,) = spans(attempt, "decode")
        assert decode.tokens == 9
        begins = [span.start_ms for span in attempt.end.timings.trace]
        assert begins == sorted(begins)


async def test_spans_count_from_the_arrival_of_the_request() -> None:
    async with running(sim()) as driver:
        attempt = driver.place(prompt(1_000), trace=True, max_tokens=9, waited_ms=5_000.0)
        await attempt.ended()
        (queued,) = spans(attempt, "worker_queue")
        # Before its placement nothing happened here; a Place itself takes no time.
        assert 5_000 <= queued.start_ms < 5_000 + 1
        assert all(span.start_ms >= 5_000 for span in attempt.end.timings.trace)


async def test_a_hand_off_is_told_by_both_sides() -> None:
    sender = sim(transfer=True, worker_id="p", incarnation=3)
    receiver = sim(transfer=True, worker_id="d", incarnation=4)
    async with running(sender) as p, running(receiver) as d:
        hand_off = mesh_from(sender, "p", 3)
        decode = d.place(prompt(200), Stage.DECODE, hand_off=hand_off, trace=True)
        await decode.opened()
        prefill = p.place(prompt(200), Stage.PREFILL, id=decode.id, hand_off=hand_off, trace=True)
        await prefill.ended()
        await decode.ended()
        assert sum(span.tokens for span in spans(prefill, "prefill_chunk")) == 200
        assert not spans(prefill, "decode")
        (transfer,) = spans(decode, "transfer")
        assert transfer.tokens == 200
        assert transfer.cause == "hand-off"
        assert spans(decode, "decode")
        (wait,) = spans(decode, "decode_wait")
        assert wait.start_ms == pytest.approx(transfer.start_ms + transfer.duration_ms)
        told = decode.end.timings
        assert told.decode_wait_ms == pytest.approx(wait.duration_ms)
        assert 0 <= told.transfer_tail_ms <= told.transfer_ms
        for field in ("transfer_tail_ms", "decode_wait_ms"):
            assert told.HasField(field)
            assert not prefill.end.timings.HasField(field)


async def test_the_wait_for_the_step_that_runs_is_told_apart_from_the_transfer(tmp_path) -> None:
    stuck, held_s = tmp_path / "stuck", 0.3
    sender = sim(transfer=True, worker_id="p", incarnation=3)
    receiver = sim(transfer=True, worker_id="d", incarnation=4, stuck_while=str(stuck))
    async with running(sender) as p, running(receiver) as d:
        hand_off = mesh_from(sender, "p", 3)
        placed = time.monotonic()
        decode = d.place(prompt(200), Stage.DECODE, hand_off=hand_off, trace=True)
        await decode.opened()
        stuck.touch()
        other = d.place(prompt(50, 1))
        await until(lambda: d.engine.load().step_age_ms)
        prefill = p.place(prompt(200), Stage.PREFILL, id=decode.id, hand_off=hand_off)
        assert await prefill.ended() == "handed_off"
        # The receiver has it all: its sender was told so.
        await p.idle()
        came_ms = (time.monotonic() - placed) * 1000
        # The step takes so much longer.
        await asyncio.sleep(held_s)
        stuck.unlink()
        await decode.ended()
        await other.ended()
        told = decode.end.timings
        assert told.transfer_tail_ms <= told.transfer_ms <= came_ms
        (transfer,), (wait,) = spans(decode, "transfer"), spans(decode, "decode_wait")
        # The engine hears of it when that step is over, and tells when it was.
        part_ms = held_s * 1000 / 2
        assert transfer.start_ms + transfer.duration_ms < came_ms + part_ms
        assert told.decode_wait_ms == pytest.approx(wait.duration_ms)
        assert wait.duration_ms > part_ms
        assert wait.cause == "steps without it"
        # It made nothing meanwhile.
        (gap,) = spans(decode, "gap")
        assert gap.duration_ms >= wait.duration_ms


async def test_a_hand_off_that_is_known_on_finish_waits_before_it_computes() -> None:
    sender = sim("vllm", transfer=True, worker_id="p", incarnation=3)
    receiver = sim("vllm", transfer=True, worker_id="d", incarnation=4)
    async with running(sender) as p, running(receiver) as d:
        prefill = p.place(prompt(200), Stage.PREFILL)
        assert await prefill.ended() == "handed_off"
        hand_off = wire.HandOff(engine=prefill.end.handed_off.engine)
        decode = d.place(prompt(200), Stage.DECODE, id=prefill.id, hand_off=hand_off, trace=True)
        assert await decode.ended() == "finished"
        told = decode.end.timings
        assert told.HasField("transfer_tail_ms")
        assert told.HasField("decode_wait_ms")
        (chunk,), (decoded,) = spans(decode, "prefill_chunk"), spans(decode, "decode")
        assert chunk.tokens == 1
        assert not spans(decode, "decode_wait")
        (gap,) = spans(decode, "gap")
        assert gap.start_ms >= decoded.start_ms


def test_time_between_chunks_is_a_pause_with_its_cause() -> None:
    trace = Trace(10.0)
    trace.chunk_begins(10.5)
    trace.add("prefill_chunk", 10.5, 11.0, 64)
    trace.cause = "room"
    trace.chunk_begins(12.0)
    trace.add("prefill_chunk", 12.0, 12.5, 64)
    told = [(s.name, s.start_ms, s.duration_ms, s.cause) for s in trace.spans()]
    assert told == [
        ("worker_queue", 0, 500, ""),
        ("prefill_chunk", 500, 500, ""),
        ("pause", 1000, 1000, "room"),
        ("prefill_chunk", 2000, 500, ""),
    ]


def test_a_trace_is_bounded_and_still_counts_every_token() -> None:
    trace = Trace(0.0)
    for number in range(5_000):
        trace.chunk_begins(float(number))
        trace.add("prefill_chunk", number, number + 0.5, 16)
    spans = trace.spans()
    assert len(spans) == MAX_SPANS
    assert sum(span.tokens for span in spans) == 80_000
    ends = [span.start_ms + span.duration_ms for span in spans if span.name == "prefill_chunk"]
    assert max(ends) == 4_999_500
    assert sum(span.ByteSize() for span in spans) < 48 * 1024


def test_the_longest_gap_of_a_stream_has_its_cause() -> None:
    log = StepLog()
    log.add(0.0, 1.0)  # before it joined
    log.add(10.0, 10.1)
    log.add(10.1, 10.4, 64)
    log.add(10.6, 10.7)
    assert log.longest_gap(10.0, 10.5) == (10.1, 10.4, 64, "prompts in the same step")
    log.add(11.4, 11.5)
    begin, end, tokens, cause = log.longest_gap(10.0, 20.0)
    assert (begin, end, tokens, cause) == (10.7, 11.5, 0, "steps without it")
    # One that joins between two steps waits for the end of the second.
    assert log.longest_gap(11.0, 20.0) == (11.0, 11.5, 0, "steps without it")
    assert log.longest_gap(30.0, 40.0) is None


def test_a_stream_whose_kv_came_during_a_step_waits_for_that() -> None:
    log = StepLog()
    log.add(8.0, 10.0)
    log.add(10.0, 11.2, 512)
    log.add(11.2, 11.3)
    log.add(11.3, 11.35)
    prompts = "prompts in the step that ran when its KV came"
    assert log.beside(10.5) == (512, prompts)
    assert log.beside(9.0) == (0, "the step that ran when its KV came")
    assert log.beside(11.4) == (0, "steps without it")
    # It joins when that step has ended.
    assert log.longest_gap(11.2, 20.0, came=10.5) == (10.5, 11.3, 512, prompts)
    # What came just before its end had to wait for its own step.
    assert log.longest_gap(11.2, 20.0, came=11.19) == (11.19, 11.3, 0, "a step of its batch")


def test_the_wait_of_a_stream_whose_first_step_is_forgotten_is_not_made_up() -> None:
    log = StepLog()
    for number in range(StepLog.KEPT + 1):
        log.add(float(number), number + 0.5)
    begin, end, *_ = log.longest_gap(-100.0, 1e9, came=-200.0)
    assert end - begin == 1.0


async def test_only_the_most_urgent_prompt_is_timed_to_its_first_layer(tmp_path) -> None:
    stuck = tmp_path / "stuck"
    stuck.touch()
    async with running(sim(stuck_while=str(stuck))) as driver:
        first = driver.place(prompt(2_000), deadline_ms=1_000.0)
        # The others come while it is in its first layer.
        await until(lambda: driver.engine.load().step_age_ms)
        behind = driver.place(prompt(100), deadline_ms=5_000.0)
        before = driver.place(prompt(64), deadline_ms=10.0)
        stuck.unlink()
        for attempt in (first, behind, before):
            await attempt.ended()
        timings = {name: attempt.end.timings for name, attempt in
                   (("first", first), ("behind", behind), ("before", before))}  # fmt: skip
        assert timings["first"].HasField("urgent_start_ms")
        assert timings["before"].HasField("urgent_start_ms")
        assert not timings["behind"].HasField("urgent_start_ms")
