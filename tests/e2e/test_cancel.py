"""A client may leave at any moment, in any way: all that it held comes back."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import Cluster
from crowd import POINTS, Crowd
from figures import Figures, figures, wait_figures, wait_quiet
from held import held, wait_held
from raw_http2 import RawHttp2, message

import kvmesh
from kvmesh.engine.sim.settings import PROFILES
from kvmesh.v1 import inference_pb2, worker_pb2

_numbers = itertools.count()

CALLS_A_CONNECTION = 250

BLOCK = 16
CHUNK = PROFILES["cpu-135m"].model.saturating_chunk
"""Most tokens of a prompt in a step of `slow`."""

LEAVE: dict[str, Callable[[RawHttp2, int], None]] = {
    "cancels": lambda raw, stream: raw.reset(stream),
    "vanishes": lambda raw, _: raw.vanish(),
}


@pytest.fixture(params=list(LEAVE))
def leave(request) -> Callable[[RawHttp2, int], None]:
    """How a client goes."""
    return LEAVE[request.param]


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Iterator[Cluster]:
    """A pair in which every state lasts: 0.6 s or more for 128 tokens of a prompt, and
    two seconds for a token of the output. Requests go to their workers well
    before these would start them."""
    cluster = Cluster(tmp_path_factory.mktemp("slow"))
    try:
        endpoint = cluster.start_router("--dispatch-ahead", "1m")
        steps = f"profile=cpu-135m,stuck_while={_stuck(cluster)}"
        cluster.start_worker("p", "prefill", "--engine-arguments", steps)
        cluster.start_worker("d", "decode", "--engine-arguments", "profile=cpu-135m,speed=0.025")
        cluster.wait_live(endpoint, "p", "d")
        yield cluster
    finally:
        cluster.close()


def _stuck(cluster: Cluster) -> Path:
    return cluster.folder / "stuck"


@contextmanager
def standing(cluster: Cluster) -> Iterator[None]:
    """Meanwhile the layer that runs on p does not end."""
    _stuck(cluster).touch()
    try:
        yield
    finally:
        _stuck(cluster).unlink()


def ask(tokens: int, *, output: int = 1_000) -> bytes:
    """A request with a prompt of its own."""
    rng = random.Random(next(_numbers))
    return message(
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=rng.choices(range(3, 2_000), k=tokens)),
            stopping=inference_pb2.Stopping(max_tokens=output, ignore_end_of_text=True),
        )
    )


def wait_load(
    cluster: Cluster, name: str, holds: Callable[[worker_pb2.LoadShare, worker_pb2.KvRoom], bool]
) -> worker_pb2.Load:
    """Looks until something holds of a worker's whole load and its pool."""
    for _ in range(6_000):
        load = cluster.info(name).load
        whole = worker_pb2.LoadShare()
        for field in whole.DESCRIPTOR.fields:
            if field.message_type is not None:
                continue
            share = getattr(load.own, field.name) + getattr(load.others, field.name)
            setattr(whole, field.name, share)
        if holds(whole, load.kv):
            return load
        cluster.children.wait(0.01)
    raise AssertionError(f"{name} never came to it: {load}")


def wait_at_rest(cluster: Cluster, name: str) -> worker_pb2.Load:
    """Looks until nobody holds a block of a worker's pool."""
    return wait_load(cluster, name, lambda _, kv: not (kv.running or kv.pinned or kv.reserved))


def assert_one_left(cluster: Cluster, before: Figures) -> None:
    """Exactly one client left, and that was no failure of anybody."""
    endpoint = cluster.endpoints[0]
    wait_figures(cluster, endpoint, {"cancelled_total": before["cancelled_total"] + 1})
    wait_quiet(cluster, endpoint, *cluster.workers)
    now = figures(endpoint)
    assert now["failed_total"] == before["failed_total"]
    assert now["violations_total"] == 0
    cluster.assert_alive()


def test_while_it_is_queued_at_the_router(fresh, leave) -> None:
    endpoint = fresh.start_router()
    steps = fresh.steps("speed=10", profile="cpu-135m")
    fresh.start_worker("a", "both", "--kv-pool-tokens", "512", *steps)
    fresh.wait_live(endpoint, "a")
    fresh.slow_down()
    before = figures(endpoint)
    with RawHttp2(endpoint) as first, RawHttp2(endpoint) as second:
        running = first.call(ask(300, output=180))
        wait_load(fresh, "a", lambda share, _: share.decoding == 1)
        waiting = second.call(ask(300))
        wait_figures(fresh, endpoint, {"queued_requests": 1})
        leave(second, waiting)
        wait_figures(fresh, endpoint, {"queued_requests": 0, "open_streams": 1})
        fresh.speed_up()
        # The first never noticed.
        assert first.status(running) == 0
    assert_one_left(fresh, before)


def test_while_decode_has_reserved_and_prefill_has_not_begun(slow, leave) -> None:
    endpoint = slow.endpoints[0]
    before = figures(endpoint)
    with RawHttp2(endpoint) as first, RawHttp2(endpoint) as second:
        # It is not done before it is left.
        blocker = first.call(ask(6_000))
        wait_load(slow, "p", lambda share, _: share.running_prefill_tokens > 0)
        waiting = second.call(ask(2_000))
        wait_load(slow, "d", lambda share, _: share.receiving == 2)
        wait_load(slow, "p", lambda share, _: share.queued == 1)
        leave(second, waiting)
        wait_load(slow, "p", lambda share, _: share.queued == 0)
        wait_load(slow, "d", lambda share, _: share.receiving == 1)
        wait_figures(slow, endpoint, {"cancelled_total": before["cancelled_total"] + 1})
        first.reset(blocker)
        before["cancelled_total"] += 1
        assert_one_left(slow, before)


def test_while_prefill_computes_and_blocks_flow(slow, leave) -> None:
    endpoint = slow.endpoints[0]
    before = figures(endpoint)
    kept = {name: wait_at_rest(slow, name).kv.evictable for name in slow.workers}
    with RawHttp2(endpoint) as raw:
        stream = raw.call(ask(6_000))
        wait_load(slow, "p", lambda share, _: 0 < share.running_prefill_tokens < 5_600)
        # It leaves in the middle of a step, which goes on once decode has nothing of it any
        # more: prefill was told at the same moment, and a step takes it 0.6 s.
        with standing(slow):
            leave(raw, stream)
            wait_figures(slow, endpoint, {"cancelled_total": before["cancelled_total"] + 1})
            slow.wait_empty("d")
            then = slow.info("p").load
        assert_one_left(slow, before)
    now = wait_at_rest(slow, "p")
    # By the worker's own counter no step was begun after the cancel and came to its end, ...
    assert now.step <= then.step
    # ... and of the one that ran at most its chunk counts: what is computed stays as a prefix.
    computed = 6_000 - then.own.running_prefill_tokens
    made = BLOCK * (now.kv.evictable - kept["p"])
    assert computed <= made <= computed + CHUNK
    # Blocks had come to decode and were checked: they stay there, too.
    assert wait_at_rest(slow, "d").kv.evictable > kept["d"]


def test_between_the_hand_off_and_decodes_first_token(slow, leave) -> None:
    endpoint = slow.endpoints[0]
    before = figures(endpoint)
    with RawHttp2(endpoint) as raw:
        stream = raw.call(ask(100))
        for event in raw.events(stream):
            if event.HasField("tokens"):
                break
        assert event.tokens.first_index == 0
        assert len(event.tokens.ids) == 1
        leave(raw, stream)
        assert_one_left(slow, before)


def test_while_it_decodes(slow, leave) -> None:
    endpoint = slow.endpoints[0]
    before = figures(endpoint)
    with RawHttp2(endpoint) as raw:
        stream = raw.call(ask(100))
        for event in raw.events(stream):
            if event.tokens.first_index == 2:
                break
        # It decodes alone, so that a step of the worker is a token; this one runs.
        step = slow.info("d").load.step
        assert slow.info("d").load.own.decoding == 1
        leave(raw, stream)
        assert_one_left(slow, before)
    # By the worker's own counter at most one token was computed after the cancel.
    assert slow.info("d").load.step - step <= 1
    assert figures(endpoint)["tokens_total"] - before["tokens_total"] <= 5


def test_before_its_message_is_whole(slow, leave) -> None:
    endpoint = slow.endpoints[0]
    before = figures(endpoint)
    with RawHttp2(endpoint) as raw:
        stream = raw.call(ask(1_000)[:900], end=False)
        wait_figures(slow, endpoint, {"connections": before["connections"] + 1})
        leave(raw, stream)
        wait_quiet(slow, endpoint, "p", "d")
    assert figures(endpoint)["placements_total"] == before["placements_total"]


def test_a_client_that_does_not_read_costs_ids_and_is_given_up(fresh) -> None:
    endpoint = fresh.start_router("--slow-client-timeout", "10s")
    fresh.start_worker("a", "both", "--engine-arguments", "profile=step-10ms,speed=10")
    fresh.wait_live(endpoint, "a")
    with RawHttp2(endpoint, window=256) as raw, kvmesh.Client(endpoint) as other:
        stream = raw.call(ask(50, output=30_000))
        wait_figures(fresh, endpoint, {"open_streams": 1})
        # Generation is not paused for it: ids wait.
        while figures(endpoint)["undelivered_ids"] < 200:
            assert figures(endpoint)["open_streams"] == 1
            fresh.children.wait(0.01)
        assert len(other.complete(prompt="Undisturbed", max_tokens=20).token_ids) <= 20
        wait_figures(fresh, endpoint, {"slow_clients_total": 1})
        # It has not read a byte yet, and nothing is held for it any more.
        wait_quiet(fresh, endpoint, "a")
        # Its window is shut, so that no status can pass: the stream was reset.
        assert raw.status(stream) is None
    fresh.assert_alive()


async def test_two_hundred_that_leave_at_random_leave_nothing(tmp_path) -> None:
    cluster = Cluster(tmp_path)
    try:
        endpoint = cluster.start_router()
        for name, role in (
            ("p1", "prefill"),
            ("p2", "prefill"),
            ("d1", "decode"),
            ("d2", "decode"),
        ):
            cluster.begin_worker(name, role, "--kv-pool-tokens", "16384")
        cluster.wait_live(endpoint, "p1", "p2", "d1", "d2")
        rng = random.Random(3)
        async with kvmesh.AsyncClient(endpoint) as client:
            ends = await asyncio.gather(*(leave_at_random(client, rng) for _ in range(200)))
            # A deadline that cannot be met is refused at once, not waited for.
            allowed = {"left", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
            assert {"left", "DEADLINE_EXCEEDED"} <= set(ends) <= allowed
            wait_quiet(cluster, endpoint, "p1", "p2", "d1", "d2")
            cluster.assert_alive()
            assert figures(endpoint)["violations_total"] == 0
            last = await client.complete(prompt="After them. " * 30, max_tokens=5, temperature=0)
            again = await client.complete(prompt="After them. " * 30, max_tokens=5, temperature=0)
            assert last.token_ids == again.token_ids
    finally:
        cluster.close()


def leave_at_random_points(endpoint: str, rng: random.Random, count: int) -> Counter[str]:
    """Calls, some tens at a time, that are all left; by how far they had come."""
    left: Counter[str] = Counter()
    heads = [rng.choices(range(3, 2_000), k=512) for _ in range(8)]
    for begun in range(0, count, CALLS_A_CONNECTION):
        bodies = [any_prompt(rng, heads) for _ in range(min(CALLS_A_CONNECTION, count - begun))]
        with Crowd(endpoint, rng) as crowd:
            crowd.come_and_go(bodies)
            crowd.leave_all(vanish=rng.random() < 0.5)
            left += crowd.left
    return left


def any_prompt(rng: random.Random, heads: list[list[int]]) -> bytes:
    """A request: one in four begins as others do, so that blocks are shared and pulled."""
    head = rng.choice(heads) if rng.randrange(4) == 0 else []
    own = rng.choices(range(3, 2_000), k=rng.choice([20, 100, 300, 1_000]))
    return message(
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[*head, *own]),
            stopping=inference_pb2.Stopping(max_tokens=1_000, ignore_end_of_text=True),
        )
    )


def test_ten_thousand_that_leave_at_any_point_leave_nothing(tmp_path) -> None:
    workers = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}
    cluster = Cluster(tmp_path)
    try:
        endpoint = cluster.start_router()
        for name, role in workers.items():
            steps = ("--engine-arguments", "profile=step-10ms")
            cluster.begin_worker(name, role, "--kv-pool-tokens", "16384", *steps)
        cluster.wait_live(endpoint, *workers)
        rng = random.Random(5)
        # Workers connect to each other when they first need to, and keep that for a while.
        leave_at_random_points(endpoint, rng, 2_000)
        wait_quiet(cluster, endpoint, *workers)
        before, told = held(cluster), figures(endpoint)

        left = leave_at_random_points(endpoint, rng, 10_000)
        assert left.total() == 10_000
        assert all(left[point] > 0 for point in POINTS), left
        wait_quiet(cluster, endpoint, *workers)
        wait_held(cluster, before)
        now = figures(endpoint)
        assert now["failed_total"] == told["failed_total"]
        assert now["violations_total"] == 0
        cluster.assert_alive()
        with kvmesh.Client(endpoint) as client:
            prompt = "After them. " * 30
            last, again = (client.complete(prompt=prompt, max_tokens=5) for _ in range(2))
            assert last.token_ids == again.token_ids
    finally:
        cluster.close()


async def leave_at_random(client: kvmesh.AsyncClient, rng: random.Random) -> str:
    """A stream that ends after some events, or at a deadline in any state."""
    prompt = rng.choices(range(3, 2_000), k=rng.choice([20, 200, 1_000, 3_000]))
    events = rng.randrange(6)
    timeout = rng.choice([None, rng.uniform(0.001, 1.0)])
    stream = client.generate(
        token_ids=prompt, max_tokens=5_000, ignore_end_of_text=True, timeout=timeout
    )
    try:
        seen = 0
        async for _ in stream:
            if timeout is None and seen >= events:
                break
            seen += 1
    except kvmesh.MeshError as error:
        return error.code.name
    finally:
        await stream.aclose()
    return "left"
