"""Shapes that a cluster can have, and what it tells of itself in each."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from cluster import Cluster
from figures import figures, wait_figures, wait_quiet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

import kvmesh
from kvmesh.cli import main
from kvmesh.cli.children import ChildDiedError
from kvmesh.v1 import admin_pb2, inference_pb2, inference_pb2_grpc

PROMPTS = [f"Prompt {number} of several. " * (3 + 5 * number) for number in range(8)]
OPTIONS = {"max_tokens": 24, "temperature": 0, "ignore_end_of_text": True}
VLLM = ("--like", "vllm")
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[list[int]]:
    """What a single worker that does everything answers."""
    cluster = Cluster(tmp_path_factory.mktemp("reference"))
    try:
        endpoint = cluster.start_router()
        cluster.start_worker("a", "both")
        cluster.wait_live(endpoint, "a")
        return answers(endpoint)
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> Iterator[Cluster]:
    """Two prefill and two decode workers."""
    cluster = Cluster(tmp_path_factory.mktemp("square"))
    try:
        endpoint = cluster.start_router()
        start(cluster, endpoint, p1="prefill", p2="prefill", d1="decode", d2="decode")
        yield cluster
    finally:
        cluster.close()


def start(cluster: Cluster, endpoint: str, *arguments: str, **roles: str) -> None:
    for name, role in roles.items():
        cluster.begin_worker(name, role, *arguments)
    cluster.wait_live(endpoint, *roles)


def answers(endpoint: str) -> list[list[int]]:
    with kvmesh.Client(endpoint) as client:
        return [list(client.complete(prompt=prompt, **OPTIONS).token_ids) for prompt in PROMPTS]


def test_workers_of_both_roles_alone(fresh, reference) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, a="both", b="both")
    assert answers(endpoint) == reference
    wait_quiet(fresh, endpoint, "a", "b")


def test_decode_computes_prompts_until_a_prefill_worker_joins(fresh, reference) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, d="decode")
    with kvmesh.Client(endpoint) as client:
        alone = client.complete(prompt=PROMPTS[5], **OPTIONS)
        assert list(alone.token_ids) == reference[5]
        assert alone.timings.transferred_bytes == 0
        start(fresh, endpoint, p="prefill")
        joined = client.complete(prompt=PROMPTS[6], **OPTIONS)
        assert list(joined.token_ids) == reference[6]
        assert joined.timings.transferred_bytes > 0
        fresh.kill("p")
        fresh.wait_table(endpoint, lambda table: "p" not in table)
        again = client.complete(prompt=PROMPTS[7], **OPTIONS)
        assert list(again.token_ids) == reference[7]
    wait_quiet(fresh, endpoint, "d")


def test_one_worker_grows_into_pools_and_neither_client_nor_router_begins_anew(
    fresh, reference
) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, a="both")
    with kvmesh.Client(endpoint) as client:

        def moved(number: int) -> bool:
            answer = client.complete(prompt=PROMPTS[number], **OPTIONS)
            assert list(answer.token_ids) == reference[number]
            return answer.timings.transferred_bytes > 0

        assert not moved(3)
        start(fresh, endpoint, p="prefill", d="decode")
        assert main(["drain", "a", "--stop", "--endpoint", endpoint]) == 0
        fresh.forget("a")
        fresh.wait_table(endpoint, lambda table: "a" not in table)
        assert moved(4)
        start(fresh, endpoint, p2="prefill", d2="decode")
        assert all(moved(number) for number in (5, 6, 7))
        # And back to one.
        start(fresh, endpoint, b="both")
        for name in ("p", "p2", "d", "d2"):
            assert main(["drain", name, "--stop", "--endpoint", endpoint]) == 0
            fresh.forget(name)
        fresh.wait_table(endpoint, lambda table: list(table) == ["b"])
        assert not moved(2)
    wait_quiet(fresh, endpoint, "b")


def test_prefill_alone_decodes_nothing(fresh) -> None:
    endpoint = fresh.start_router()
    fresh.start_worker("p", "prefill")
    live = admin_pb2.SESSION_STATE_LIVE
    fresh.wait_table(endpoint, lambda table: "p" in table and table["p"].state == live)
    with kvmesh.Client(endpoint) as client, pytest.raises(kvmesh.MeshUnavailableError) as caught:
        client.complete(prompt="a", **OPTIONS)
    assert caught.value.reason == "NO_WORKER"


def test_a_second_turn_finds_what_the_first_left(square) -> None:
    endpoint = square.endpoints[0]
    with kvmesh.Client(endpoint) as client:
        for number in range(6):
            turns = [{"role": "user", "content": f"Conversation {number}. " * 30}]
            first = client.complete(messages=turns, **OPTIONS)
            turns += [
                {"role": "assistant", "content": first.text},
                {"role": "user", "content": "Go on."},
            ]
            second = client.complete(messages=turns, **OPTIONS)
            # All whole blocks of the first prompt, wherever the second turn ran.
            found = second.usage.cached_tokens + second.usage.pulled_tokens
            assert found >= first.usage.prompt_tokens // 16 * 16 - 16
            assert second.usage.computed_tokens == second.usage.prompt_tokens - found
            assert second.usage.attempts == 1
    wait_quiet(square, endpoint, "p1", "p2", "d1", "d2")


def test_a_square_answers_as_one_worker(square, reference) -> None:
    assert answers(square.endpoints[0]) == reference
    # Again, with all of it cached.
    assert answers(square.endpoints[0]) == reference


def test_pools_whose_hand_off_is_the_engines(fresh, reference) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, *VLLM, p="prefill", d="decode")
    assert answers(endpoint) == reference
    assert figures(endpoint)["violations_total"] == 0
    wait_quiet(fresh, endpoint, "p", "d")


def test_pools_of_both_hand_offs_side_by_side(fresh, reference) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, p1="prefill", d1="decode")
    start(fresh, endpoint, *VLLM, p2="prefill", d2="decode")
    for _ in range(3):
        assert answers(endpoint) == reference
    with kvmesh.Client(endpoint) as client:
        # A half alone, and halves that do not pair: decode does it all.
        for gone in ("p1", "d2"):
            fresh.kill(gone)
            fresh.wait_table(endpoint, lambda table, gone=gone: gone not in table)
            assert list(client.complete(prompt=PROMPTS[2], **OPTIONS).token_ids) == reference[2]
    wait_quiet(fresh, endpoint, "d1", "p2")


def test_where_tokens_depend_on_the_attempt_a_hand_off_keeps_it(fresh) -> None:
    endpoint = fresh.start_router()
    mixed = ("--engine-arguments", "attempt_tokens=true")
    start(fresh, endpoint, *mixed, a="both")
    alone = answers(endpoint)
    fresh.kill("a")
    start(fresh, endpoint, *mixed, p="prefill", d="decode")
    fresh.wait_table(endpoint, lambda table: "a" not in table)
    assert answers(endpoint) == alone
    assert figures(endpoint)["transfers_started_total"] > 0


def test_series_of_metrics_are_bounded(square) -> None:
    endpoint = square.endpoints[0]
    answers(endpoint)
    series = figures(endpoint)
    of_workers = [name for name in series if 'worker="' in name]
    assert len(of_workers) % 4 == 0
    assert len(series) - len(of_workers) + len(of_workers) // 4 * 64 <= 2_000
    assert not any("prompt" in name.partition("{")[2] for name in series)
    # In the form that scrapers take: each histogram has its last bucket.
    assert any('le="+Inf"' in name for name in series)
    wanted = (
        "open_streams", "attempts_total", "stale_frames_total", "queued_requests",
        "request_bytes_held", "sessions", "lane_bytes_total", "transfers_started_total",
        "kv_blocks", "etcd_connected",
    )  # fmt: skip
    names = {name.partition("{")[0] for name in series}
    assert not set(wanted) - names


def test_router_and_worker_tell_their_health(square) -> None:
    for address, service in (
        (square.endpoints[0], "kvmesh.v1.Inference"),
        (square.worker_address("p1"), "kvmesh.v1.Worker"),
    ):
        stub = health_pb2_grpc.HealthStub(square.channel(address))
        for name in ("", service):
            request = health_pb2.HealthCheckRequest(service=name)
            assert stub.Check(request, timeout=10).status == SERVING
            watch = stub.Watch(request, timeout=10)
            assert next(watch).status == SERVING
            watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="none.Such")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(unknown, timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(unknown, timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


def reflected(channel: grpc.Channel, version: str) -> set[str]:
    """Services that reflection lists; both versions have the same messages."""
    method = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = method(iter([request]), timeout=10)
    return {service.name for service in answer.list_services_response.service}


def test_router_and_worker_describe_themselves(square) -> None:
    router = square.channel(square.endpoints[0])
    for version in ("v1", "v1alpha"):
        assert {"kvmesh.v1.Inference", "grpc.health.v1.Health"} <= reflected(router, version)
    worker = square.channel(square.worker_address("d1"))
    assert {"kvmesh.v1.Worker", "grpc.health.v1.Health"} <= reflected(worker, "v1alpha")


def test_names_of_a_call_come_back(square) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    stub = inference_pb2_grpc.InferenceStub(square.channel(square.endpoints[0]))
    request = inference_pb2.GenerateRequest(prompt="Named")
    request.stopping.max_tokens = 3
    call = stub.Generate(
        request, metadata=(("traceparent", trace), ("x-request-id", "mine")), timeout=30
    )
    list(call)
    back = dict(call.initial_metadata())
    assert back["x-request-id"] == "mine"
    assert back["traceparent"].split("-")[1] == trace.split("-")[1]
    unnamed = stub.Generate(request, timeout=30)
    list(unnamed)
    assert dict(unnamed.initial_metadata())["x-request-id"]


def test_a_router_that_is_killed_leaves_its_workers_empty(fresh) -> None:
    first = fresh.start_router()
    start(fresh, first, p="prefill", d="decode")
    second = fresh.start_router()
    fresh.wait_live(second, "p", "d")
    with kvmesh.Client(first) as lost, kvmesh.Client(second) as other:
        streams = [
            lost.generate(prompt=prompt, max_tokens=20_000, ignore_end_of_text=True)
            for prompt in PROMPTS[:4]
        ]
        for stream in streams:
            next(event for event in stream if isinstance(event, kvmesh.Tokens))
        kept = other.generate(prompt="Kept", max_tokens=300, ignore_end_of_text=True)
        next(kept)
        fresh.kill_router(first)
        for stream in streams:
            with pytest.raises(kvmesh.MeshUnavailableError):
                list(stream)
        *_, last = kept
        assert last.usage.output_tokens == 300
    wait_quiet(fresh, second, "p", "d")
    fresh.assert_alive()


def test_a_worker_comes_back_under_its_name(fresh, reference) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, a="both")
    before = fresh.table(endpoint)["a"].record.incarnation
    fresh.kill("a")
    fresh.start_worker("a", "both")
    fresh.wait_table(
        endpoint, lambda table: "a" in table and table["a"].record.incarnation != before
    )
    fresh.wait_live(endpoint, "a")
    assert answers(endpoint) == reference
    wait_figures(fresh, endpoint, {"open_streams": 0})


def test_a_second_worker_of_a_name_is_refused_by_it(fresh) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, twin="both")
    first = fresh.workers["twin"]
    second = fresh.begin_worker("twin", "both")
    with pytest.raises(ChildDiedError, match="ended with status 2"):
        fresh.children.wait_for(second, "never said")
    assert "worker_id: twin is taken" in second.tail()
    assert "Traceback" not in second.tail()
    fresh.workers["twin"] = first
    assert len(answers(endpoint)) == len(PROMPTS)


def test_a_killed_workers_record_goes_with_its_lease(fresh) -> None:
    endpoint = fresh.start_router()
    start(fresh, endpoint, a="both")
    assert "kvmesh/v1/default/workers/a" in keys(fresh)
    # The router's own record is what etcd's Go resolver reads.
    assert any(key.startswith("kvmesh/v1/default/routers/") for key in keys(fresh))
    fresh.kill("a")
    for _ in range(50 * (fresh.ttl_s + 30)):
        if "kvmesh/v1/default/workers/a" not in keys(fresh):
            return
        fresh.children.wait(0.02)
    raise AssertionError("the record outlived its lease")


def keys(cluster: Cluster) -> list[str]:
    """All keys in etcd, by its JSON face."""

    def coded(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    question = {"key": coded("kvmesh/"), "range_end": coded("kvmesh0"), "keys_only": True}
    asked = urllib.request.Request(
        f"http://{cluster.etcd}/v3/kv/range", data=json.dumps(question).encode()
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:
        found = json.load(answer).get("kvs", [])
    return [base64.b64decode(entry["key"]).decode() for entry in found]
