"""Pools change under load, classes are held to their targets, and requests are explained."""

import asyncio
import random
import sys

import pytest
from figures import figures
from step_watch import step_watch

import kvmesh
from kvmesh.cli import main
from kvmesh.engine.core.step_model import StepLoad, gap_target_ms, predict_ms
from kvmesh.engine.sim.settings import PROFILES
from kvmesh.v1 import worker_pb2

# Steps of some 10 ms: streams live through every flip.
PACED = ("--engine-arguments", "profile=h100-8b,speed=0.6")
OUTPUT = 120
STREAMS = 24

# The longest gap that streams ask for: some blocks of a prompt fit beside them.
SLOW, ITL_TARGET_MS, BLOCK = "cpu-135m", 300, 16


def flip(endpoint: str, worker: str, role: str) -> None:
    assert main(["role", worker, role, "--endpoint", endpoint]) == 0


async def test_flips_under_load_lose_no_stream(fresh) -> None:
    endpoint = fresh.start_router()
    for name, role in {"a": "prefill", "b": "prefill", "c": "decode", "d": "decode"}.items():
        fresh.begin_worker(name, role, *PACED)
    fresh.wait_live(endpoint, "a", "b", "c", "d")
    options = {"max_tokens": OUTPUT, "temperature": 0.0, "ignore_end_of_text": True}

    async def one(client: kvmesh.AsyncClient, number: int, speaks: asyncio.Event) -> list[int]:
        ids: list[int] = []
        prompt = f"Stream {number}. " * (5 + number)
        async for event in client.generate(prompt=prompt, **options):
            if isinstance(event, kvmesh.Tokens):
                assert event.first_index == len(ids)
                ids += event.ids
                speaks.set()
        return ids

    async with kvmesh.AsyncClient(endpoint) as client:
        running = []
        # Each flip meets streams that decode, that are prefilled, and that are to come.
        for worker, role in (("a", "decode"), ("c", "prefill"), ("a", "both"), ("c", "decode")):
            speaks = asyncio.Event()
            running += [
                asyncio.create_task(one(client, len(running) + n, speaks))
                for n in range(STREAMS // 4)
            ]
            await speaks.wait()
            await asyncio.to_thread(flip, endpoint, worker, role)
        answers = await asyncio.gather(*running)
        assert [len(ids) for ids in answers] == [OUTPUT] * STREAMS
        # Whatever role their workers had: the tokens are those of an undisturbed run.
        again = await asyncio.gather(
            *(one(client, number, asyncio.Event()) for number in range(STREAMS))
        )
    assert again == answers
    table = fresh.table(endpoint)
    roles = {name: status.load.role for name, status in table.items()}
    assert roles == {
        "a": worker_pb2.ROLE_BOTH,
        "b": worker_pb2.ROLE_PREFILL,
        "c": worker_pb2.ROLE_DECODE,
        "d": worker_pb2.ROLE_DECODE,
    }
    assert figures(endpoint)["failed_total"] == 0
    fresh.wait_empty("a", "b", "c", "d")


def test_a_flip_that_would_empty_a_role_is_refused(pair, capsys) -> None:
    endpoint = pair.endpoints[0]
    assert main(["role", "p", "decode", "--endpoint", endpoint]) == 1
    assert "role" in capsys.readouterr().err
    assert pair.table(endpoint)["p"].load.role == worker_pb2.ROLE_PREFILL


def by_class(endpoint: str, name: str) -> dict[str, float]:
    """Requests of a class by how they ended."""
    now = figures(endpoint)
    ends = ("good", "late_first_token", "slow_tokens", "refused", "failed", "cancelled")
    return {end: now.total("class_requests_total", **{"class": name, "outcome": end})
            for end in ends}  # fmt: skip


@pytest.mark.parametrize(
    ("hints", "outcome"),
    [
        # Targets that any machine keeps, and one that none does: a prompt is a step of 10 ms.
        ({"ttft_target_ms": 3_600_000, "itl_target_ms": 3_600_000}, "good"),
        ({"ttft_target_ms": 1, "itl_target_ms": 3_600_000}, "late_first_token"),
    ],
)
def test_goodput_is_counted_by_class(fresh, hints, outcome) -> None:
    endpoint = fresh.start_router()
    fresh.start_worker("a", "both", *PACED)
    fresh.wait_live(endpoint, "a")
    with kvmesh.Client(endpoint) as client:
        for name in ("interactive", "batch"):
            client.complete(prompt="Within its targets?", max_tokens=8, request_class=name, **hints)
    for name in ("interactive", "batch"):
        ends = by_class(endpoint, name)
        assert {end for end, count in ends.items() if count} == {outcome}
        assert ends[outcome] == 1
    assert not any(by_class(endpoint, "standard").values())


def test_who_leaves_is_no_loss_of_goodput(pair, client) -> None:
    before = by_class(pair.endpoints[0], "interactive")
    stream = client.generate(prompt="Left early", max_tokens=2_000, request_class="interactive",
                             ignore_end_of_text=True)  # fmt: skip
    for event in stream:
        if isinstance(event, kvmesh.Tokens):
            break
    stream.close()
    pair.wait_empty("p", "d")
    for _ in range(500):
        now = by_class(pair.endpoints[0], "interactive")
        if now["cancelled"] == before["cancelled"] + 1:
            break
        pair.children.wait(0.02)
    assert now == {**before, "cancelled": before["cancelled"] + 1}


def test_urgent_prompts_are_timed_to_their_first_layer(pair, client) -> None:
    before = figures(pair.endpoints[0]).total("urgent_start_seconds_count")
    client.complete(prompt="Nobody is before me", max_tokens=2)
    now = figures(pair.endpoints[0])
    assert now.total("urgent_start_seconds_count") == before + 1


def test_a_second_turn_pulls_the_answer_from_where_it_was_decoded(fresh) -> None:
    endpoint = fresh.start_router()
    # A token takes longer to compute than to move.
    slowly = ("--engine-arguments", "profile=cpu-135m")
    fresh.start_worker("p", "prefill", *slowly)
    fresh.start_worker("d", "decode", *slowly)
    fresh.wait_live(endpoint, "p", "d")
    turn = [500 + n for n in range(60)]
    with kvmesh.Client(endpoint) as client:
        options = {"max_tokens": 68, "temperature": 0.0, "ignore_end_of_text": True}
        first = client.complete(token_ids=turn, **options)
        history = [*turn, *first.token_ids]
        # All but the last token's KV, in whole blocks.
        held = (len(history) - 1) // 16 * 16
        fresh.wait_table(endpoint, lambda t: t["d"].indexed_blocks >= held // 16)
        second = client.complete(token_ids=[*history, *turn], **options)
    usage = second.usage
    assert usage.cached_tokens == 60 // 16 * 16
    assert usage.pulled_tokens == held - usage.cached_tokens
    assert usage.computed_tokens == usage.prompt_tokens - held


async def test_decode_takes_over_prompts_that_are_too_many_for_prefill_and_gives_them_back(
    fresh,
) -> None:
    endpoint = fresh.start_router("--local-prefill", "by-cost")
    # Two seconds for the prompts below, on a worker that does nothing else.
    slowly = ("--engine-arguments", f"profile={SLOW}")
    fresh.start_worker("p", "prefill", *slowly)
    fresh.start_worker("d", "decode", *slowly)
    fresh.wait_live(endpoint, "p", "d")
    rng = random.Random(5)
    options = {"temperature": 0.0, "ignore_end_of_text": True, "itl_target_ms": ITL_TARGET_MS}

    def prompt(tokens: int) -> list[int]:
        return rng.choices(range(300, 1_900), k=tokens)

    async with (
        kvmesh.AsyncClient(endpoint) as client,
        step_watch(fresh.worker_address("d"), "sim", ITL_TARGET_MS) as steps,
    ):

        async def speak(speaks: asyncio.Event) -> None:
            async for event in client.generate(token_ids=prompt(32), max_tokens=4_000, **options):
                if isinstance(event, kvmesh.Tokens):
                    speaks.set()

        async def by_prefill() -> bool:
            done = await client.complete(token_ids=prompt(400), max_tokens=2, **options)
            return done.timings.transferred_bytes > 0

        # Streams that a prompt beside them would hold up: prefill has it.
        started = [asyncio.Event() for _ in range(4)]
        speaking = [asyncio.create_task(speak(speaks)) for speaks in started]
        for speaks in started:
            await speaks.wait()
        assert await by_prefill()
        # Six at once would wait for each other there: some are better off with decode.
        assert set(await asyncio.gather(*(by_prefill() for _ in range(6)))) == {True, False}
        assert await by_prefill()
        for task in speaking:
            task.cancel()
        await asyncio.gather(*speaking, return_exceptions=True)
    fresh.wait_empty("p", "d")
    assert_within_target(steps)


def assert_within_target(steps: list[worker_pb2.StepSample]) -> None:
    """By what the steps of a worker held: its streams had their tokens within their target,
    as its own model of its steps has it."""
    model = PROFILES[SLOW].model
    # The streams are in each of them: no prompt is computed between their steps.
    assert all(step.decode_batch for step in steps)
    mixed = [step for step in steps if step.prefill_tokens]
    for step in mixed:
        load = StepLoad(decode_batch=step.decode_batch, decode_context=step.decode_context)
        target_ms = gap_target_ms(ITL_TARGET_MS, predict_ms(model, load))
        load.prefill_tokens, load.prefill_context = step.prefill_tokens, step.prefill_context
        assert predict_ms(model, load) <= target_ms, step
    # A prompt always gets a block, and without streams as much as its steps are worth.
    assert BLOCK <= max(step.prefill_tokens for step in mixed) < model.saturating_chunk


def test_a_trace_tells_the_whole_way_and_explain_shows_it(pair, client, capsys) -> None:
    done = client.complete(prompt="Where did the time go? " * 20, max_tokens=16, trace=True,
                           ignore_end_of_text=True)  # fmt: skip
    names = [span.name for span in done.trace]
    assert names[0] == "tokenize"
    for name in ("queue", "decide", "worker_queue", "prefill_chunk", "transfer", "decode_wait",
                 "decode", "gap"):  # fmt: skip
        assert name in names
    starts = [span.start_ms for span in done.trace]
    assert starts == sorted(starts)
    timings = done.timings
    assert timings.longest_gap_cause
    assert timings.longest_gap_start_ms >= timings.first_token_ms - 0.001
    assert timings.longest_gap_start_ms + timings.longest_gap_ms <= timings.total_ms + 0.001
    assert main(["explain", done.generation_id, "--endpoint", pair.endpoints[0]]) == 0
    out = capsys.readouterr().out
    assert "longest gap" in out
    assert timings.longest_gap_cause in out
    assert "prefill_chunk" in out


def test_explain_has_the_spans_of_a_share_though_nobody_asked_for_a_trace(fresh, capsys) -> None:
    endpoint = fresh.start_router("--explain-traces", "1")
    fresh.start_worker("a", "both")
    fresh.wait_live(endpoint, "a")
    with kvmesh.Client(endpoint) as client:
        done = client.complete(prompt="Where did the time go? " * 20, max_tokens=16)
    assert done.trace == ()
    assert main(["explain", done.generation_id, "--endpoint", endpoint]) == 0
    out = capsys.readouterr().out
    for name in ("decide", "worker_queue", "prefill_chunk", "decode"):
        assert f" {name} " in out


def test_a_stop_string_ends_with_figures_that_are_true(fresh, capsys) -> None:
    endpoint = fresh.start_router()
    fresh.start_worker("a", "both", *PACED)
    fresh.wait_live(endpoint, "a")
    options = {"prompt": "Where did the time go? " * 20, "max_tokens": 400, "temperature": 0,
               "ignore_end_of_text": True}  # fmt: skip
    with kvmesh.Client(endpoint) as client:
        whole = client.complete(**(options | {"max_tokens": 40}))
        stop = whole.text[10:13]
        cut = client.complete(**options, stop=stop, trace=True)
    assert cut.stop_string == stop
    usage, timings = cut.usage, cut.timings
    assert usage.cached_tokens > 0
    assert usage.cached_tokens + usage.computed_tokens == usage.prompt_tokens
    assert timings.prefill_ms > 0
    assert timings.worker_queue_ms > 0
    names = {span.name for span in cut.trace}
    assert {"worker_queue", "prefill_chunk", "decode"} <= names
    assert main(["explain", cut.generation_id, "--endpoint", endpoint]) == 0
    assert "prefill_chunk" in capsys.readouterr().out
    fresh.wait_empty("a")


def test_the_planner_says_why_it_holds_and_changes_nothing(pair, client, capsys) -> None:
    client.complete(prompt="Something came", max_tokens=2)
    endpoint = pair.endpoints[0]
    # The router looks by itself: whoever asks once hears what it has seen by then.
    pair.wait_router(endpoint, lambda info: info.uptime_s > 20)
    assert main(["planner", "--apply", "--once", "--endpoint", endpoint]) == 0
    out = capsys.readouterr().out
    assert "sim: 1 prefill, 1 decode" in out
    assert "no flip: each pool is within its targets" in out
    roles = {name: status.load.role for name, status in pair.table(endpoint).items()}
    assert roles == {"p": worker_pb2.ROLE_PREFILL, "d": worker_pb2.ROLE_DECODE}


async def test_long_jobs_of_one_model_do_not_delay_another_ones_chat(fresh) -> None:
    endpoint = fresh.start_router("--queue-length", "3")
    # Seconds for each job, on a worker that does nothing else.
    fresh.start_worker("slow", "both", "--engine-arguments", "profile=cpu-135m")
    fresh.start_worker("quick", "both", "--model", "chat")
    fresh.wait_live(endpoint, "slow", "quick")
    rng = random.Random(11)

    def job() -> list[int]:
        return rng.choices(range(300, 1_900), k=1_500)

    async with kvmesh.AsyncClient(endpoint) as client:
        options = {"max_tokens": 4, "request_class": "batch"}

        def begin() -> asyncio.Task[kvmesh.Result]:
            return asyncio.create_task(client.complete(model="sim", token_ids=job(), **options))

        # One is computed; the others wait, and are as many as may.
        jobs = [begin()]
        await asyncio.to_thread(fresh.wait_table, endpoint, lambda t: t["slow"].running == 1)
        jobs += [begin() for _ in range(3)]
        await asyncio.to_thread(fresh.wait_router, endpoint, lambda info: info.queued == 3)
        with pytest.raises(kvmesh.OverloadedError, match="the queue is full"):
            await client.complete(model="sim", token_ids=job(), **options)
        for turn in range(8):
            said = await client.complete(model="chat", prompt=f"Turn {turn}", max_tokens=16,
                                         request_class="interactive",
                                         ignore_end_of_text=True)  # fmt: skip
            assert len(said.token_ids) == 16
        # Nor are those that are less urgent in the way of a chat of their own model.
        said = await client.complete(model="sim", prompt="And you?", max_tokens=2,
                                     request_class="interactive")  # fmt: skip
        assert said.usage.output_tokens > 0
        assert not any(task.done() for task in jobs[1:])
        for task in jobs:
            task.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
    fresh.wait_empty("slow", "quick")


def test_a_planner_without_a_router_says_so(capsys) -> None:
    assert main(["planner", "--once", "--endpoint", "127.0.0.1:1", "--timeout-s", "2"]) == 1
    assert "no router answers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("roles", "then"),
    [
        (["prefill", "decode", "decode"], ["prefill", "prefill", "decode"]),
        # Nobody to spare: the last that decodes computes prompts, too.
        (["prefill", "decode"], ["prefill", "both"]),
    ],
)
async def test_the_planner_gives_a_worker_to_the_pool_that_is_short(fresh, roles, then) -> None:
    endpoint = fresh.start_router()
    slowly = ("--engine-arguments", "profile=cpu-135m")
    names = [f"{role}-{number}" for number, role in enumerate(roles)]
    for name, role in zip(names, roles, strict=True):
        fresh.begin_worker(name, role, *slowly)
    fresh.wait_live(endpoint, *names)
    command = [sys.executable, "-m", "kvmesh.cli", "planner", "--apply", "--endpoint", endpoint]
    fresh.children.spawn("planner", command)
    flipped = asyncio.Event()
    wanted = [worker_pb2.Role.Value(f"ROLE_{role.upper()}") for role in then]

    async def prompts(client: kvmesh.AsyncClient, number: int) -> int:
        """Prompts one after the other: four at a time are more than one worker computes."""
        count = 0
        while not flipped.is_set():
            ids = [300 + (number * 7_919 + count * 104_729 + n * 31) % 1_500 for n in range(600)]
            done = await client.complete(token_ids=ids, max_tokens=2, ignore_end_of_text=True,
                                         request_class="interactive")  # fmt: skip
            assert len(done.token_ids) == 2
            count += 1
        return count

    def look() -> None:
        fresh.wait_table(
            endpoint,
            lambda table: sorted(s.load.role for s in table.values()) == sorted(wanted),
            seconds=120,
        )

    async with kvmesh.AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
        asking = [group.create_task(prompts(client, number)) for number in range(4)]
        try:
            await asyncio.to_thread(look)
        finally:
            flipped.set()
    assert all(task.result() for task in asking)
    assert figures(endpoint)["failed_total"] == 0
