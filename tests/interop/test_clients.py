"""Stubs that others make from proto/ get what our own client gets."""

import pytest
from figures import figures, wait_figures

import kvmesh

TOKENS = [20, 21, 22, 23]
TEXT_TOKENS = ",".join(map(str, TOKENS))


@pytest.fixture
def expected(endpoint):
    with kvmesh.Client(endpoint.target) as client:
        return client.complete(token_ids=TOKENS, max_tokens=24, ignore_end_of_text=True)


def check(answer, expected):
    assert answer["code"] == "OK", answer
    assert answer["accepted"]
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["text"] == expected.text
    assert answer["finish_reason"] == "FINISH_REASON_LENGTH"
    assert answer["output_tokens"] == 24


def test_go_finds_a_router_through_etcds_resolver_and_streams(endpoint, go_client, expected):
    answer = go_client(etcd=endpoint.etcd, cluster=endpoint.cluster, tokens=TEXT_TOKENS, max=24)
    check(answer, expected)


def test_go_without_an_authority_of_its_own_is_refused_by_http2(endpoint, go_client):
    # As docs/protocols.md says. Should this fail, h2 has learnt to take it: say so there.
    answer = go_client(etcd=endpoint.etcd, cluster=endpoint.cluster, authority="", timeout="20s")
    assert answer["code"] == "Internal", answer
    assert "PROTOCOL_ERROR" in answer["message"]
    assert answer["token_ids"] == []


def test_go_sees_the_status_of_an_unknown_model(endpoint, go_client):
    answer = go_client(target=endpoint.target, model="no-such-model")
    assert answer["code"] == "NotFound"
    assert answer["token_ids"] == []


def test_go_keeps_the_tokens_that_came_before_its_deadline(endpoint, go_client):
    answer = go_client(etcd=endpoint.etcd, cluster=endpoint.cluster, max=20000, timeout="10s")
    assert answer["code"] == "DeadlineExceeded"
    assert answer["accepted"]
    assert 0 < len(answer["token_ids"]) < 20000


def test_node_streams_with_a_stub_made_from_the_proto_files(endpoint, node_client, expected):
    answer = node_client(target=endpoint.target, tokens=TEXT_TOKENS, max=24)
    check(answer, expected)


def test_node_sees_the_status_of_an_unknown_model(endpoint, node_client):
    answer = node_client(target=endpoint.target, model="no-such-model")
    assert answer["code"] == "NOT_FOUND"
    assert answer["token_ids"] == []


def test_node_keeps_the_tokens_that_came_before_its_deadline(endpoint, node_client):
    answer = node_client(target=endpoint.target, max=20000, timeout=10)
    assert answer["code"] == "DEADLINE_EXCEEDED"
    assert answer["accepted"]
    assert 0 < len(answer["token_ids"]) < 20000


@pytest.mark.parametrize("endpoint", ["mesh"], indirect=True)
def test_node_speaks_openais_http_to_a_router(endpoint, node_openai_held):
    with node_openai_held(target=endpoint.target, model=endpoint.model, max=24) as answer:
        # What it gave up is cancelled while it lives on: an answer for which it had no time, and
        # a stream that it left.
        wait_figures(endpoint.processes, endpoint.target, {"open_streams": 0})
        told = figures(endpoint.target)
        cancelled = {"method": "chat.completions", "outcome": "CANCELLED"}
        assert told.total("calls_total", **cancelled) == 2
    assert answer["late"] == "APIConnectionTimeoutError"
    assert answer["content"]
    assert answer["streamed"] == answer["content"]
    assert answer["reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 24
    assert endpoint.model in answer["models"]
    refused = {"status": 400, "param": "tools", "kind": "BadRequestError"}
    assert refused.items() <= answer["refused"].items()


@pytest.mark.parametrize("endpoint", ["mesh"], indirect=True)
def test_nodes_openai_package_tries_again_when_it_was_told(endpoint, node_openai):
    cluster = endpoint.processes
    # One request may come at once, the next one when the rate allows it: five seconds later.
    target = cluster.start_router("--tenant-requests-per-s", "0.2")
    cluster.wait_live(target, "w")
    answer = node_openai(target=target, model=endpoint.model, retries=8)
    assert answer["reasons"] == ["length"] * 2
    assert answer["sent"] > 2
    cluster.kill_router(target)


def test_nodes_openai_package_reads_tool_calls(caller, node_openai):
    answer = node_openai(target=caller, model="caller", caller="caller")
    expected = {"reason": "tool_calls", "calls": [["weather", '{"city": "Paris"}']]}
    assert answer["called"] == {"whole": expected, "streamed": expected}
