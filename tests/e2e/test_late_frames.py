"""What prefill says late, decode has said before it: each token once, in order."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from cluster import Cluster
from fault_proxy import FaultProxy
from figures import figures, wait_figures, wait_quiet

import kvmesh

LATE_MS = 500
STEPS = ("--engine-arguments", "profile=step-10ms")


@pytest.fixture
def late(tmp_path) -> Iterator[Cluster]:
    """Whatever prefill says reaches the router half a second late; decode gets
    the blocks at once, and a step takes it 10 ms."""
    cluster = Cluster(tmp_path)
    try:
        cluster.start_worker("p", "prefill", "--etcd", "", *STEPS)
        with FaultProxy(cluster.worker_address("p")) as proxy:
            proxy.tell(f"down delay {LATE_MS}")
            # Each prompt is to be prefill's.
            apart = ("--local-prefill", "without-prefill-workers")
            endpoint = cluster.start_router("--workers", proxy.address, *apart)
            cluster.start_worker("d", "decode", *STEPS)
            cluster.wait_live(endpoint, "p", "d")
            yield cluster
    finally:
        cluster.close()


def test_a_first_token_that_comes_late_comes_once(late) -> None:
    endpoint = late.endpoints[0]
    rng = random.Random(5)
    with kvmesh.Client(endpoint) as client:

        def ask(tokens: int) -> None:
            prompt = rng.choices(range(300, 2_000), k=100)
            asked = {"token_ids": prompt, "max_tokens": tokens, "ignore_end_of_text": True}
            delivered: list[int] = []
            for event in client.generate(**asked):
                if isinstance(event, kvmesh.Tokens):
                    assert event.first_index == len(delivered)
                    delivered.extend(event.ids)
            assert len(delivered) == tokens
            # The other way round the same tokens come: decode has nothing to wait for.
            assert delivered == list(client.complete(**asked).token_ids)

        for tokens in (5, 20, 100, 200):
            ask(tokens)
        wait_quiet(late, endpoint, "p", "d")
        wait_figures(late, endpoint, {"open_attempts": 0})
        # A short output is over before prefill's word of its first token comes, unless the
        # machine takes half a second for it: sooner or later one is.
        for _ in range(100):
            if figures(endpoint)["stale_frames_total"]:
                break
            ask(5)
            wait_figures(late, endpoint, {"open_attempts": 0})
    now = figures(endpoint)
    assert now["stale_frames_total"] > 0
    assert now["plans_split_total"] > 0
    assert now["violations_total"] == 0
    assert now["failed_total"] == 0
    late.assert_alive()
