"""SMG over the whole mesh: its OpenAI face, its engine's tokens, its cancels, its errors."""

import json
import time
import urllib.request

import pytest
from figures import figures, wait_figures
from front import MODEL, Refused

import kvmesh

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = "/v1/chat/completions"


def asked(**more):
    return {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "temperature": 0, **more}


def straight(front, **more) -> str:
    """The router's own answer, without SMG."""
    with kvmesh.Client(front.target) as client:
        return client.complete(messages=QUESTION, max_tokens=24, temperature=0, **more).text


def test_a_chat_through_smg_has_the_tokens_of_the_mesh(front):
    done = {"method": "VllmEngine/Generate", "outcome": "OK"}
    before = figures(front.target).total("calls_total", **done)
    expected = straight(front)
    assert "Paris" in expected
    whole = front.ask(CHAT, asked())
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == expected
    usage = whole["usage"]
    assert 0 < usage["completion_tokens"] <= 24

    *events, last = front.events(CHAT, asked(stream_options={"include_usage": True}))
    said = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(said) == expected
    # It streams: more than one piece, and the usage of all of it.
    assert sum(map(bool, said)) > 1
    for key in ("prompt_tokens", "completion_tokens"):
        assert last["usage"][key] == usage[key]
    # Both came by this API and no other.
    assert figures(front.target).total("calls_total", **done) == before + 2


def test_several_answers_log_probabilities_and_stops_come_through(front):
    whole = front.ask(CHAT, asked(n=3, logprobs=True, top_logprobs=2))
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    # Greedy: all the same.
    assert len(texts) == 3
    assert len(set(texts)) == 1
    for choice in whole["choices"]:
        told = choice["logprobs"]["content"]
        assert "".join(token["token"] for token in told).startswith(texts[0])
        assert all(token["logprob"] <= 0 for token in told)
        assert all(len(token["top_logprobs"]) == 2 for token in told)
    stopped = front.ask(CHAT, asked(stop=["Paris"]))["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == texts[0].partition("Paris")[0]


def test_a_client_of_smg_that_goes_is_cancelled_in_the_mesh(front):
    body = asked(stream=True, max_tokens=1_000, ignore_eos=True)
    with front.open(CHAT, body) as answer:
        assert next(iter(answer)).startswith(b"data: ")
    wait_figures(front.cluster, front.target, {"open_streams": 0, "open_attempts": 0})
    cancelled = {"method": "VllmEngine/Generate", "outcome": "CANCELLED"}
    assert figures(front.target).total("calls_total", **cancelled) >= 1


def test_what_the_mesh_refuses_reaches_the_client_in_words(front):
    with pytest.raises(Refused) as told:
        front.ask(CHAT, asked(max_tokens=1_000_000))
    assert told.value.status == 400
    assert "sampling_params.max_tokens: at most" in told.value.body
    with pytest.raises(Refused) as told:
        front.ask(CHAT, asked(response_format={"type": "json_object"}))
    assert told.value.status == 501
    assert "cannot constrain its output" in told.value.body


def engine_seen(front) -> dict:
    """What SMG says of its worker, once it has asked for its load."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"{front.url}/workers", timeout=10) as answer:
            (worker,) = json.load(answer)["workers"]
        if "engine_load" in worker:
            return worker
        assert time.monotonic() < deadline, worker
        front.cluster.children.wait(0.1)


def test_smg_knows_the_engine_that_it_sees(front):
    worker = engine_seen(front)
    assert worker["runtime_type"] == "vllm"
    assert worker["is_healthy"]
    labels = worker["labels"]
    assert labels["served_model_name"] == MODEL
    assert int(labels["max_context_length"]) == 8_192
    (load,) = worker["engine_load"]["loads"]
    assert load["max_total_num_tokens"] > 0
