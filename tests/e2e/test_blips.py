"""A session that breaks while worker and router live costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster
from fault_proxy import FaultProxy
from figures import figures, wait_figures, wait_quiet
from many_streams import Streams, prompts

COUNT = 12


@pytest.fixture
def behind(fresh, request) -> Iterator[tuple[Cluster, FaultProxy, str]]:
    """A prefill worker, and a decode worker whose sessions go by a fault proxy.

    The parameter is for how long a session may be away.
    """
    grace = getattr(request, "param", "60s")
    fresh.start_worker("d", "decode", "--etcd", "", *fresh.steps())
    with FaultProxy(fresh.worker_address("d")) as proxy:
        endpoint = fresh.start_router("--workers", proxy.address, "--reattach-grace", grace)
        fresh.start_worker("p", "prefill", *fresh.steps())
        fresh.wait_live(endpoint, "p", "d")
        yield fresh, proxy, endpoint


@pytest.mark.parametrize(
    "breaks",
    [
        pytest.param("cut", id="closed in order"),
        pytest.param("reset", id="reset"),
        pytest.param("down cut 1001", id="cut in the middle of a frame"),
    ],
)
def test_streams_go_on_where_they_are(behind, breaks) -> None:
    cluster, proxy, endpoint = behind
    cluster.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 250)
    for count in (10, 25):
        streams.wait(count)
        before = figures(endpoint)["reattached_total"]
        proxy.tell(breaks)
        while proxy.connections() and figures(endpoint)["reattached_total"] == before:
            assert streams.running, "they ended before their session broke"
            cluster.children.wait(0.005)
        # A cut would else meet the next connection too.
        proxy.tell("heal")
        while figures(endpoint)["reattached_total"] < before + COUNT:
            assert streams.running, "they ended and were not taken up again"
            cluster.children.wait(0.01)
    cluster.speed_up()
    streams.assert_undisturbed()
    assert streams.attempts() == [1] * COUNT
    now = figures(endpoint)
    assert now.total("migrations_total") == now["recomputed_tokens_total"] == 0
    assert now["failed_total"] == now["violations_total"] == 0
    wait_quiet(cluster, endpoint, "p", "d")
    cluster.assert_alive()


@pytest.mark.parametrize("behind", ["1s"], indirect=True)
def test_a_session_that_stays_away_is_a_loss(behind) -> None:
    cluster, proxy, endpoint = behind
    cluster.start_worker("d2", "decode", *cluster.steps())
    cluster.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 300)
    streams.wait(20)
    proxy.tell("refuse on", "reset")
    cluster.speed_up()
    cluster.wait_live(endpoint, "d2")
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now['migrations_total{cause="broken"}'] > 0
    assert now["failed_total"] == 0
    proxy.tell("heal")
    # What it still had is dropped when its router is back.
    cluster.wait_live(endpoint, "d")
    wait_quiet(cluster, endpoint, "p", "d", "d2")
    cluster.assert_alive()


def test_a_client_that_leaves_during_the_blip_leaves_nothing(behind) -> None:
    import kvmesh

    cluster, proxy, endpoint = behind
    with kvmesh.Client(endpoint) as client:
        stream = client.generate(prompt="Left", max_tokens=5_000, ignore_end_of_text=True)
        for event in stream:
            if isinstance(event, kvmesh.Tokens):
                break
        proxy.tell("refuse on", "reset")
        stream.close()
        wait_figures(cluster, endpoint, {"open_streams": 0})
        proxy.tell("heal")
        cluster.wait_live(endpoint, "d")
    wait_quiet(cluster, endpoint, "p", "d")
    assert figures(endpoint)["failed_total"] == 0
