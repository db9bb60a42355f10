"""A stream outlives its router: the client goes on at another one by itself."""

from __future__ import annotations

import pytest
from cluster import Cluster
from figures import figures
from many_streams import Streams, prompts, undisturbed

import kvmesh

COUNT = 8


@pytest.fixture
def two_routers(fresh) -> Cluster:
    """Two routers, a prefill and a decode worker."""
    endpoints = [fresh.start_router() for _ in range(2)]
    fresh.start_worker("p", "prefill", *fresh.steps())
    fresh.start_worker("d", "decode", "--orphan-ttl", "500ms", *fresh.steps())
    for endpoint in endpoints:
        fresh.wait_live(endpoint, "p", "d")
    return fresh


def either(cluster: Cluster) -> str:
    """A target that names both routers; the first that answers is taken."""
    return "ipv4:" + ",".join(cluster.endpoints)


def test_a_killed_router_ends_no_stream(two_routers) -> None:
    first, second = two_routers.endpoints
    two_routers.slow_down()
    streams = Streams(either(two_routers), prompts(COUNT), 250)
    streams.wait(20)
    used = first if figures(first)["open_streams"] else second
    two_routers.kill_router(used)
    two_routers.speed_up()
    streams.assert_undisturbed()
    left = two_routers.endpoints[0]
    assert figures(left)["finished_total"] == COUNT
    # What the dead one had placed is not kept for ever.
    two_routers.wait_empty("p", "d")


def test_router_and_worker_killed_at_once_end_no_stream(two_routers) -> None:
    two_routers.start_worker("d2", "decode", *two_routers.steps())
    for endpoint in two_routers.endpoints:
        two_routers.wait_live(endpoint, "d2")
    first, second = two_routers.endpoints
    two_routers.slow_down()
    streams = Streams(either(two_routers), prompts(COUNT), 250)
    streams.wait(20)
    used = first if figures(first)["open_streams"] else second
    two_routers.kill_router(used)
    two_routers.kill("d")
    two_routers.speed_up()
    streams.assert_undisturbed()
    two_routers.wait_empty("p", "d2")


def test_the_blocking_client_goes_on_too_and_its_text_is_whole(two_routers) -> None:
    asked = {"prompt": "Hello there", "max_tokens": 200, "ignore_end_of_text": True, "seed": 5}
    with kvmesh.Client(either(two_routers)) as client:
        whole = client.complete(**asked)
        events = []
        two_routers.slow_down()
        for event in client.generate(**asked):
            events.append(event)
            running = len(two_routers.endpoints) == 2
            if running and isinstance(event, kvmesh.Tokens) and event.first_index >= 30:
                first, second = two_routers.endpoints
                two_routers.kill_router(first if figures(first)["open_streams"] else second)
                two_routers.speed_up()
    assert len(two_routers.endpoints) == 1
    tokens = [event for event in events if isinstance(event, kvmesh.Tokens)]
    assert [
        index for t in tokens for index in range(t.first_index, t.first_index + len(t.ids))
    ] == [*range(200)]
    text = "".join(t.text for t in tokens) + events[-1].text
    assert text == whole.text
    assert sum(isinstance(event, kvmesh.Accepted) for event in events) == 1


def test_any_router_goes_on_from_what_a_client_holds(two_routers) -> None:
    from kvmesh.v1 import inference_pb2, inference_pb2_grpc

    (prompt,) = prompts(1)
    whole = undisturbed(prompt, 40)
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        stopping=inference_pb2.Stopping(max_tokens=40, ignore_end_of_text=True),
    )
    stub = inference_pb2_grpc.InferenceStub(two_routers.channel(two_routers.endpoints[1]))
    for had in (0, 1, 20, 39, 40):
        request.continue_from.token_ids[:] = whole[:had]
        delivered = whole[:had]
        for response in stub.Generate(request, timeout=60):
            if response.HasField("tokens"):
                assert response.tokens.first_index == len(delivered)
                delivered.extend(response.tokens.ids)
        assert delivered == whole
        assert response.finished.usage.output_tokens == 40
