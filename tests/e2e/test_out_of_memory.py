"""A worker that gets no memory fails its steps, not its streams: they go on elsewhere.

So they do where the kernel kills it for its memory.
"""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

from cluster import Cluster
from figures import figures, wait_quiet
from many_streams import VOCABULARY, Streams, prompts
from memory_bound import MemoryBound

from kvmesh.engine.sim.content import reference_tokens
from kvmesh.v1 import admin_pb2

COUNT = 12
LARGE = 256 << 10
"""Bytes of a block of 16 tokens."""


def start(cluster: Cluster, short: Path, *workers: str) -> str:
    """A router and workers named for their roles, the first of which is short of memory while
    the file is there."""
    endpoint = cluster.start_router()
    roles = {"p": "prefill", "d": "decode"}
    for name in workers:
        more = [f"out_of_memory_while={short}"] if name == workers[0] else []
        cluster.begin_worker(name, roles[name[0]], *cluster.steps(*more))
    cluster.wait_live(endpoint, *workers)
    return endpoint


def assert_moved(cluster: Cluster, endpoint: str, streams: Streams) -> None:
    """All ended as if nothing had happened; some of them had to go on elsewhere."""
    streams.assert_undisturbed()
    assert max(streams.attempts()) > 1
    now = figures(endpoint)
    assert now['migrations_total{cause="failed"}'] > 0
    assert now["failed_total"] == now["violations_total"] == 0
    wait_quiet(cluster, endpoint, *cluster.workers)
    # It lives, and holds nothing of what it failed.
    cluster.assert_alive()


def test_streams_of_a_decode_worker_without_memory_go_on_and_it_is_let_in_again(
    fresh, tmp_path
) -> None:
    short = tmp_path / "short"
    endpoint = start(fresh, short, "d1", "d2", "p1")
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 250)
    streams.wait(20)
    held = fresh.table(endpoint)["d1"].load.own.decoding
    assert held >= 3, "as many answers fail before a worker is left out"
    short.touch()
    # Slow as they are, none of them is done before it is met by that.
    while not figures(endpoint)["ejections_total"]:
        assert streams.running
        fresh.children.wait(0.02)
    fresh.speed_up()
    assert_moved(fresh, endpoint, streams)

    short.unlink()
    seeds = itertools.count(2)

    def serves(table: dict[str, admin_pb2.WorkerStatus]) -> bool:
        # One request decides, and it has to come.
        Streams(endpoint, prompts(COUNT, seed=next(seeds)), 3).assert_undisturbed()
        return table["d1"].state == admin_pb2.SESSION_STATE_LIVE

    fresh.wait_table(endpoint, serves)


def test_prompts_of_a_prefill_worker_without_memory_are_computed_elsewhere(fresh, tmp_path) -> None:
    short = tmp_path / "short"
    endpoint = start(fresh, short, "p1", "p2", "d1")
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT, tokens=3_000), 10)
    fresh.wait_table(endpoint, lambda table: table["p1"].load.own.running_prefill_tokens > 0)
    short.touch()
    fresh.speed_up()
    assert_moved(fresh, endpoint, streams)


def test_a_worker_that_the_kernel_kills_for_its_memory_ends_no_stream(fresh) -> None:
    endpoint = fresh.start_router()
    # The memory of a block is taken as it comes into use.
    large = fresh.steps(f"block_bytes={LARGE}")
    for name, role in (("p", "prefill"), ("d1", "decode"), ("d2", "decode")):
        fresh.start_worker(name, role, "--kv-pool-tokens", "8192", *large)
    fresh.wait_live(endpoint, "p", "d1", "d2")
    fresh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 300)
    streams.wait(10)
    assert fresh.table(endpoint)["d1"].load.own.decoding > 0
    with MemoryBound(4 << 20) as bound:
        victim = fresh.workers["d1"].process
        bound.hold(victim.pid)
        # Its streams take a block each every 16 steps.
        assert victim.wait(120) == -signal.SIGKILL
        assert bound.kills() == 1
    assert streams.running
    fresh.forget("d1")
    fresh.speed_up()
    for prompt, output in zip(streams.asked, streams.join(), strict=True):
        assert output == reference_tokens(prompt, streams.tokens, VOCABULARY, LARGE // 16 // 8, 0)
    assert max(streams.attempts()) > 1
    now = figures(endpoint)
    assert now["failed_total"] == now["violations_total"] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)
    fresh.assert_alive()
