"""What a request is told of its way through an engine."""

from engine_harness import mesh_from, prompt, running, sim, until

from kvmesh.engine.contract import Stage
from kvmesh.engine.core.trace import MAX_SPANS, StepLog, Trace


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
    assert log.longest_gap(11.0, 20.0) is None
    assert log.longest_gap(30.0, 40.0) is None


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
