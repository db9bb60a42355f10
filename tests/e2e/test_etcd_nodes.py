"""An etcd of three nodes loses one, two, or all of them; nobody who asks for tokens notices."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from cluster import Cluster
from etcd_nodes import EtcdNodes

import kvmesh

LONG = {"max_tokens": 3_000, "ignore_end_of_text": True}
MARGIN_S = 30
"""etcd looks for leases that have ended every half a second, and a machine may be busy."""


@pytest.fixture
def three(tmp_path) -> Iterator[Cluster]:
    """A router, a prefill and a decode worker over three nodes of etcd."""
    cluster = Cluster(tmp_path, ttl_s=2, etcd_nodes=True)
    try:
        endpoint = cluster.start_router()
        cluster.start_worker("p", "prefill")
        cluster.start_worker("d", "decode")
        cluster.wait_live(endpoint, "p", "d")
        yield cluster
    finally:
        cluster.close()


class Stream:
    """One that runs while etcd is broken: every token once and in order."""

    def __init__(self, client: kvmesh.Client) -> None:
        self._events = client.generate(prompt="A stream over it all", **LONG)
        self._next = 0
        while self._next == 0:
            self._take(next(self._events))

    def to_its_end(self) -> None:
        for event in self._events:
            self._take(event)
        assert self._next == LONG["max_tokens"]
        assert event.usage.attempts == 1

    def _take(self, event: object) -> None:
        if isinstance(event, kvmesh.Tokens):
            assert event.first_index == self._next
            self._next += len(event.ids)


def all_registered(cluster: Cluster, endpoint: str, *names: str) -> None:
    cluster.wait_table(
        endpoint, lambda table: all(n in table and table[n].registered for n in names)
    )


@pytest.mark.parametrize(
    ("breaks", "mends"),
    [
        (EtcdNodes.kill, EtcdNodes.start),
        pytest.param(EtcdNodes.freeze, EtcdNodes.thaw, marks=pytest.mark.slow),
    ],
    ids=["killed", "frozen"],
)
def test_a_leader_that_is_gone_is_missed_by_nobody(three, breaks, mends) -> None:
    endpoint = three.endpoints[0]
    with kvmesh.Client(endpoint) as client:
        stream = Stream(client)
        leader = three.nodes.leader()
        breaks(three.nodes, leader)
        assert client.complete(prompt="Without a leader", max_tokens=4).token_ids
        # Two of three are enough to come and to be found.
        three.start_worker("x", "decode")
        three.wait_live(endpoint, "p", "d", "x")
        three.wait_router(endpoint, lambda router: router.etcd_connected)
        mends(three.nodes, leader)
        all_registered(three, endpoint, "p", "d", "x")
        stream.to_its_end()
    three.assert_alive()
    three.wait_empty("p", "d", "x")


@pytest.mark.parametrize(
    "away_s", [6, pytest.param(60, marks=pytest.mark.slow)], ids=["three leases", "a minute"]
)
def test_without_a_quorum_all_goes_on_and_ghosts_are_gone_within_a_lease_of_it(
    three, away_s
) -> None:
    """The clock here is the outage itself."""
    endpoint = three.endpoints[0]
    for name in ("ghost", "twice"):
        three.start_worker(name, "decode")
    three.wait_live(endpoint, "p", "d", "ghost", "twice")
    before = three.table(endpoint)
    with kvmesh.Client(endpoint) as client:
        lost = three.nodes.nodes[:2]
        three.nodes.kill(*lost)
        back = time.monotonic() + away_s
        three.wait_router(endpoint, lambda router: not router.etcd_connected)
        # One dies untold, one comes back as another incarnation under its old name.
        three.kill("ghost")
        three.kill("twice")
        three.begin_worker("twice", "decode")
        stream = Stream(client)
        answered = 0
        while time.monotonic() < back:
            assert client.complete(prompt=f"Without etcd, {answered}", max_tokens=16).token_ids
            answered += 1
        three.nodes.start(*lost)
        returned = time.monotonic()
        three.wait_table(
            endpoint,
            lambda table: "ghost" not in table,
            seconds=returned + three.ttl_s + MARGIN_S - time.monotonic(),
        )
        all_registered(three, endpoint, "p", "d", "twice")
        three.wait_live(endpoint, "p", "d", "twice")
        after = three.table(endpoint)
        assert after["twice"].record.incarnation != before["twice"].record.incarnation
        for name in ("p", "d"):
            assert after[name].record.incarnation == before[name].record.incarnation
        stream.to_its_end()
    three.assert_alive()
    second = three.start_router()
    three.wait_live(second, "p", "d", "twice")
    assert three.table(second).keys() == {"p", "d", "twice"}
    three.wait_empty("p", "d", "twice")


def test_nodes_that_come_back_without_their_data_are_filled_again(three) -> None:
    endpoint = three.endpoints[0]
    before = three.table(endpoint)
    with kvmesh.Client(endpoint) as client:
        stream = Stream(client)
        three.nodes.kill(*three.nodes.nodes)
        three.wait_router(endpoint, lambda router: not router.etcd_connected)
        assert client.complete(prompt="Without etcd", max_tokens=4).token_ids
        three.nodes.start(*three.nodes.nodes, keep_data=False)
        three.wait_router(endpoint, lambda router: router.etcd_connected)
        all_registered(three, endpoint, "p", "d")
        stream.to_its_end()
    three.assert_alive()
    second = three.start_router()
    three.wait_live(second, "p", "d")
    after = three.table(second)
    assert after.keys() == {"p", "d"}
    for name in ("p", "d"):
        assert after[name].record.incarnation == before[name].record.incarnation
    three.wait_empty("p", "d")
