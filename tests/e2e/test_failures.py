"""What breaks is told, and nobody else notices."""

import threading
import time

import pytest
from figures import figures

import kvmesh
from kvmesh.v1 import admin_pb2

LONG = {"max_tokens": 2_000, "ignore_end_of_text": True}
TOKENS = 500
"""Of a stream of slow steps."""
MARGIN_S = 30
"""etcd looks for leases that have ended every half a second, and a machine may be busy."""


def start_stream(client: kvmesh.Client, prompt: str, **options):
    """A stream that has begun to speak."""
    stream = client.generate(prompt=prompt, **{**LONG, **options})
    for event in stream:
        if isinstance(event, kvmesh.Tokens):
            return stream, event
    raise AssertionError("the stream ended before its first token")


def test_a_killed_worker_loses_its_streams_to_others_and_gets_no_new_ones(fresh) -> None:
    endpoint = fresh.start_router()
    for name in ("a", "b"):
        fresh.start_worker(name, "both", *fresh.steps())
    fresh.wait_live(endpoint, "a", "b")
    fresh.slow_down()
    with kvmesh.Client(endpoint) as client:
        stream, first = start_stream(client, "One stream", max_tokens=TOKENS)
        table = fresh.wait_table(
            endpoint, lambda table: any(row.load.own.decoding for row in table.values())
        )
        (killed_one,) = (name for name, row in table.items() if row.load.own.decoding)
        (left_one,) = {"a", "b"} - {killed_one}
        before = figures(endpoint)["placements_total"]
        fresh.kill(killed_one)
        killed = time.monotonic()
        # From when it is seen to be gone nothing is tried there.
        fresh.wait_table(
            endpoint,
            lambda table: (
                killed_one not in table or table[killed_one].state != admin_pb2.SESSION_STATE_LIVE
            ),
        )
        fresh.speed_up()
        for number in range(20):
            answer = client.complete(prompt=f"After it, {number}", max_tokens=3)
            assert answer.token_ids
            # What goes to the dead is planned anew: that would be the second.
            assert answer.usage.attempts == 1

        delivered = len(first.ids)
        for event in stream:
            if isinstance(event, kvmesh.Tokens):
                assert event.first_index == delivered
                delivered += len(event.ids)
        assert delivered == TOKENS
        # It alone was placed anew, and nothing else was placed but what was asked.
        moved = event.usage.attempts - 1
        assert moved >= 1
        assert figures(endpoint)["placements_total"] == before + 20 + moved
        left = killed + fresh.ttl_s + MARGIN_S - time.monotonic()
        fresh.wait_table(endpoint, lambda table: killed_one not in table, seconds=left)
        fresh.wait_empty(left_one)


def test_without_another_worker_a_stream_ends_with_the_next_index(fresh) -> None:
    endpoint = fresh.start_router("--queue-timeout", "100ms")
    fresh.start_worker("a", "both")
    fresh.wait_live(endpoint, "a")
    with kvmesh.Client(endpoint, recover_s=0) as client:
        stream, first = start_stream(client, "The last one")
        fresh.kill("a")
        delivered = len(first.ids)

        def read_on() -> None:
            nonlocal delivered
            for event in stream:
                delivered += len(event.ids)

        with pytest.raises(kvmesh.MeshUnavailableError) as caught:
            read_on()
        # All that came before the end was told, and where to go on from.
        assert caught.value.next_index == delivered


def test_without_a_worker_the_answer_is_unavailable(fresh) -> None:
    endpoint = fresh.start_router()
    with kvmesh.Client(endpoint) as client, pytest.raises(kvmesh.MeshError):
        client.complete(prompt="a", max_tokens=1, timeout=10)


@pytest.mark.parametrize("keep_data", [True, False], ids=["with its data", "without its data"])
def test_etcd_away_changes_nothing_and_when_it_is_back_all_are_found(fresh, keep_data) -> None:
    endpoint = fresh.start_router()
    fresh.start_worker("p", "prefill")
    fresh.start_worker("d", "decode")
    fresh.wait_live(endpoint, "p", "d")
    with kvmesh.Client(endpoint) as client:
        stream, _ = start_stream(client, "A stream over the outage")
        fresh.kill_etcd()
        fresh.wait_router(endpoint, lambda router: not router.etcd_connected)
        assert client.complete(prompt="While it is away", max_tokens=4).token_ids
        fresh.restart_etcd(keep_data=keep_data)
        fresh.wait_router(endpoint, lambda router: router.etcd_connected)
        fresh.wait_table(
            endpoint,
            lambda table: (
                all(table[n].registered for n in ("p", "d") if n in table)
                and {"p", "d"} <= table.keys()
            ),
        )
        *_, last = stream
        assert last.usage.output_tokens == LONG["max_tokens"]
        # A new router finds everyone: the records are there again.
        second = fresh.start_router()
        fresh.wait_live(second, "p", "d")


def test_two_routers_share_one_cluster(fresh) -> None:
    one, two = fresh.start_router(), fresh.start_router()
    fresh.start_worker("p", "prefill")
    fresh.start_worker("d", "decode")
    for endpoint in (one, two):
        fresh.wait_live(endpoint, "p", "d")
    results: dict[str, kvmesh.Result] = {}

    def ask(endpoint: str) -> None:
        with kvmesh.Client(endpoint) as client:
            results[endpoint] = client.complete(
                prompt="The same for both", max_tokens=32, temperature=0, ignore_end_of_text=True
            )

    threads = [threading.Thread(target=ask, args=(endpoint,)) for endpoint in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[one].token_ids == results[two].token_ids
    fresh.wait_empty("p", "d")


def test_a_drained_worker_finishes_what_it_has(fresh) -> None:
    endpoint = fresh.start_router()
    fresh.start_worker("a", "both")
    fresh.wait_live(endpoint, "a")
    with kvmesh.Client(endpoint) as client:
        stream, _ = start_stream(client, "Before the drain")
        fresh.start_worker("b", "both")
        fresh.wait_live(endpoint, "a", "b")
        fresh.workers["a"].process.terminate()
        *_, last = stream
        assert isinstance(last, kvmesh.Finished)
        assert last.usage.output_tokens == LONG["max_tokens"]
        assert client.complete(prompt="After", max_tokens=2).token_ids


def test_a_role_is_flipped_without_a_restart(fresh) -> None:
    endpoint = fresh.start_router()
    fresh.start_worker("a", "both")
    fresh.start_worker("b", "prefill")
    fresh.wait_live(endpoint, "a", "b")
    from kvmesh.cli import main

    assert main(["role", "b", "decode", "--endpoint", endpoint]) == 0
    from kvmesh.v1 import worker_pb2

    fresh.wait_table(endpoint, lambda t: t["b"].load.role == worker_pb2.ROLE_DECODE)
    with kvmesh.Client(endpoint) as client:
        assert client.complete(prompt="Still there", max_tokens=2).token_ids


@pytest.mark.slow
@pytest.mark.parametrize("keep_data", [True, False], ids=["with its data", "without its data"])
def test_etcd_may_be_away_for_half_a_minute(fresh, keep_data) -> None:
    """Fifteen times as long as a lease; the clock here is the outage itself."""
    endpoint = fresh.start_router()
    fresh.start_worker("p", "prefill")
    fresh.start_worker("d", "decode")
    fresh.wait_live(endpoint, "p", "d")
    with kvmesh.Client(endpoint) as client:
        fresh.kill_etcd()
        back = time.monotonic() + 30
        answered = 0
        while time.monotonic() < back:
            assert client.complete(prompt=f"While it is away, {answered}", max_tokens=16).token_ids
            answered += 1
        fresh.restart_etcd(keep_data=keep_data)
        fresh.wait_table(
            endpoint,
            lambda table: all(n in table and table[n].registered for n in ("p", "d")),
        )
        assert client.complete(prompt="When it is back", max_tokens=4).token_ids
    second = fresh.start_router()
    fresh.wait_live(second, "p", "d")
    fresh.wait_empty("p", "d")
