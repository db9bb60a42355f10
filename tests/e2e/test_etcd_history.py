"""etcd forgets: history behind a router's watch, and leases under healthy sessions. No stream notices."""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from typing import Any

from cluster import START_S, Cluster
from fault_proxy import FaultProxy
from figures import figures, wait_quiet
from many_streams import Streams, prompts

COUNT, TOKENS = 6, 300


def ask(cluster: Cluster, path: str, **fields: object) -> dict[str, Any]:
    """etcd's own API, as JSON."""
    request = urllib.request.Request(
        f"http://{cluster.etcd}/v3/{path}", json.dumps(fields).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def leases(cluster: Cluster) -> set[str]:
    return {lease["ID"] for lease in ask(cluster, "lease/leases").get("leases", ())}


def assert_unnoticed(cluster: Cluster, endpoint: str, streams: Streams) -> None:
    """Each stream ended well, where it began."""
    assert streams.running
    cluster.speed_up()
    streams.assert_undisturbed()
    assert streams.attempts() == [1] * COUNT
    now = figures(endpoint)
    assert now["failed_total"] == now["violations_total"] == 0
    wait_quiet(cluster, endpoint, *cluster.workers)
    cluster.assert_alive()


def test_history_that_is_compacted_behind_a_watch_costs_no_stream_and_hides_nobody(fresh) -> None:
    with FaultProxy(fresh.etcd) as proxy:
        etcd, fresh.etcd = fresh.etcd, proxy.address
        endpoint = fresh.start_router()
        fresh.etcd = etcd
        for name, role in (("p", "prefill"), ("goes", "prefill"), ("d", "decode")):
            fresh.start_worker(name, role, *fresh.steps())
        fresh.wait_live(endpoint, "p", "goes", "d")
        fresh.slow_down()
        streams = Streams(endpoint, prompts(COUNT), TOKENS)
        streams.wait(5)

        # What happens from here on the router's watch does not bring.
        proxy.tell("up stall on", "down stall on")
        fresh.wait_router(endpoint, lambda router: not router.etcd_connected)
        fresh.stop("goes")
        fresh.start_worker("comes", "prefill", *fresh.steps())
        assert not {"comes"} & fresh.table(endpoint).keys()
        workers = base64.b64encode(b"kvmesh/").decode(), base64.b64encode(b"kvmesh0").decode()
        revision = ask(fresh, "kv/range", key=workers[0], range_end=workers[1])["header"][
            "revision"
        ]
        ask(fresh, "kv/compaction", revision=revision, physical=True)
        # What waits on the way is lost: the next watch would begin before what is left.
        proxy.tell("cut", "heal")

        fresh.wait_live(endpoint, "p", "d", "comes")
        fresh.wait_table(endpoint, lambda table: table.keys() == {"p", "d", "comes"})
        assert_unnoticed(fresh, endpoint, streams)


def test_leases_that_are_lost_under_healthy_sessions_cost_no_stream(fresh) -> None:
    endpoint = fresh.start_router()
    for name, role in (("p", "prefill"), ("d", "decode")):
        fresh.start_worker(name, role, *fresh.steps())
    fresh.wait_live(endpoint, "p", "d")
    before = {name: fresh.table(endpoint)[name].record.incarnation for name in ("p", "d")}
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), TOKENS)
    streams.wait(5)

    lost = leases(fresh)
    # The router's and those of both workers.
    assert len(lost) == 3
    for lease in lost:
        ask(fresh, "lease/revoke", ID=lease)
    until = time.monotonic() + START_S
    while len(leases(fresh)) < 3:
        assert time.monotonic() < until, "a lease is not replaced"
        fresh.children.wait(0.02)
    assert not leases(fresh) & lost
    table = fresh.wait_table(
        endpoint, lambda table: all(n in table and table[n].registered for n in ("p", "d"))
    )
    assert {name: table[name].record.incarnation for name in ("p", "d")} == before
    assert_unnoticed(fresh, endpoint, streams)
    # Whoever starts now finds all.
    second = fresh.start_router()
    fresh.wait_live(second, "p", "d")
