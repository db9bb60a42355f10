"""Workers are replaced one by one under a busy cluster, and no stream fails."""

from __future__ import annotations

from cluster import Cluster
from figures import figures, wait_quiet
from many_streams import Streams, prompts

import kvmesh
from kvmesh.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

COUNT = 24
ROLES = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}


def begin(cluster: Cluster, *arguments: str) -> str:
    endpoint = cluster.start_router()
    for name, role in ROLES.items():
        cluster.begin_worker(name, role, *steps(cluster), *arguments)
    cluster.wait_live(endpoint, *ROLES)
    cluster.slow_down()
    return endpoint


def steps(cluster: Cluster) -> tuple[str, str]:
    """Of 5 ms, and of 50 until all that is to happen has happened."""
    return cluster.steps("speed=2")


def replace_all(cluster: Cluster, endpoint: str, *arguments: str) -> None:
    """As rolling updates do it: the new one first, then the old one goes."""
    for name, role in ROLES.items():
        cluster.start_worker(f"{name}-new", role, *steps(cluster), *arguments)
        cluster.wait_live(endpoint, f"{name}-new")
        cluster.stop(name)


def test_every_worker_is_replaced_and_nothing_is_computed_again(fresh) -> None:
    # Room for all of them on any worker: steps take the same time with many streams as with few
    # here, so that nothing spreads them.
    chosen = ("--grace", "60s", "--kv-pool-tokens", "65536")
    endpoint = begin(fresh, *chosen)
    streams = Streams(endpoint, prompts(COUNT), 2_000)
    streams.wait(10)
    replace_all(fresh, endpoint, *chosen)
    assert streams.running, "they ran all the time"
    fresh.speed_up()
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now["finished_total"] == COUNT
    assert now["failed_total"] == now["violations_total"] == 0
    # All streams passed on with their KV.
    assert now['hand_overs_total{outcome="done"}'] >= COUNT
    assert now.total("migrations_total") == 0
    assert now["recomputed_tokens_total"] == 0
    for last in streams.finished:
        assert last is not None
        assert last.usage.attempts > 1
        assert last.usage.recomputed_tokens == 0
        assert last.usage.computed_tokens == 100
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_workers_without_time_give_back_and_no_stream_fails(fresh) -> None:
    endpoint = begin(fresh, "--grace", "1ms")
    streams = Streams(endpoint, prompts(COUNT), 1_500)
    streams.wait(10)
    replace_all(fresh, endpoint, "--grace", "1ms")
    fresh.speed_up()
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now["finished_total"] == COUNT
    assert now["failed_total"] == now["violations_total"] == 0
    # What was still running when its grace ended was given back, and nothing died.
    assert now['migrations_total{cause="returned"}'] > 0
    assert now['migrations_total{cause="died"}'] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_a_worker_that_is_to_do_prompts_alone_hands_its_streams_over(fresh) -> None:
    endpoint = begin(fresh)
    streams = Streams(endpoint, prompts(COUNT), 600)
    streams.wait(10)
    admin = admin_pb2_grpc.AdminStub(fresh.channel(endpoint))
    admin.SetWorkerRole(
        admin_pb2.SetWorkerRoleRequest(worker_id="d1", role=worker_pb2.ROLE_PREFILL), timeout=10
    )
    fresh.wait_table(endpoint, lambda table: table["d1"].load.own.decoding == 0)
    assert streams.running
    fresh.speed_up()
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now['hand_overs_total{outcome="done"}'] > 0
    assert now["recomputed_tokens_total"] == now["failed_total"] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_a_second_drain_finds_streams_where_the_first_has_put_them(fresh) -> None:
    endpoint = begin(fresh, "--grace", "60s")
    streams = Streams(endpoint, prompts(COUNT), 1_000)
    streams.wait(10)
    fresh.stop("d1")
    fresh.start_worker("d3", "decode", *steps(fresh))
    fresh.wait_live(endpoint, "d3")
    fresh.stop("d2")
    assert streams.running
    fresh.speed_up()
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now['hand_overs_total{outcome="done"}'] > COUNT
    assert now["recomputed_tokens_total"] == now["failed_total"] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_a_full_cluster_lets_streams_finish_where_they_are(fresh) -> None:
    endpoint = fresh.start_router()
    room = ("--kv-pool-tokens", "4096")
    for name, role in ROLES.items():
        if name != "p2":
            fresh.begin_worker(name, role, *steps(fresh), *room, "--grace", "60s")
    fresh.wait_live(endpoint, "p1", "d1", "d2")
    # Three fill the room of each that decodes.
    fresh.slow_down()
    streams = Streams(endpoint, prompts(6, tokens=1_000), 150)
    streams.wait(5)
    fresh.stop("d1")
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now["failed_total"] == now["recomputed_tokens_total"] == 0
    assert now.total("migrations_total") == 0
    wait_quiet(fresh, endpoint, *fresh.workers)


def test_a_real_model_goes_on_with_the_words_that_one_worker_would_say(fresh) -> None:
    """SmolLM2, greedy: a stream that was handed over says what it says undisturbed."""
    endpoint = fresh.start_router()
    for name, role in (("p", "prefill"), ("d1", "decode"), ("d2", "decode")):
        fresh.start_worker(name, role, "--grace", "120s", "--threads", "1", engine="torch")
    fresh.wait_live(endpoint, "p", "d1", "d2")
    ask = {"prompt": "The capital of France is", "max_tokens": 96, "temperature": 0.0}
    with kvmesh.Client(endpoint) as client:
        alone = client.complete(**ask)
        events = client.generate(**ask)
        text, worker = "", ""
        for event in events:
            if isinstance(event, kvmesh.Tokens):
                text += event.text
                if not worker and event.first_index > 4:
                    table = fresh.wait_table(
                        endpoint, lambda t: any(t[n].load.own.decoding for n in ("d1", "d2"))
                    )
                    worker = max(("d1", "d2"), key=lambda n: table[n].load.own.decoding)
                    stub = admin_pb2_grpc.AdminStub(fresh.channel(endpoint))
                    stub.DrainWorker(
                        admin_pb2.DrainWorkerRequest(worker_id=worker, stop=True), timeout=30
                    )
            elif isinstance(event, kvmesh.Finished):
                usage = event.usage
    assert text == alone.text
    assert usage.attempts > 1
    assert usage.recomputed_tokens == 0
    assert figures(endpoint)['hand_overs_total{outcome="done"}'] == 1
