"""Clusters for the tests that need a whole one."""

from collections.abc import Iterator

import pytest
from cluster import Cluster

import kvmesh


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Cluster]:
    """One router, one prefill and one decode worker with the simulated engine."""
    cluster = Cluster(tmp_path_factory.mktemp("pair"))
    try:
        endpoint = cluster.start_router()
        cluster.start_worker("p", "prefill")
        cluster.start_worker("d", "decode")
        cluster.wait_live(endpoint, "p", "d")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def client(pair) -> Iterator[kvmesh.Client]:
    with kvmesh.Client(pair.endpoints[0]) as connected:
        yield connected


@pytest.fixture
def fresh(tmp_path) -> Iterator[Cluster]:
    """An etcd and nothing else: the test starts what it will break."""
    cluster = Cluster(tmp_path, ttl_s=2)
    try:
        yield cluster
    finally:
        cluster.close()
