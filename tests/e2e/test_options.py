"""What a request asks for beyond tokens holds over the whole mesh: the torch
engine draws, prefill hands over to decode, the router makes the text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster

import kvmesh
from kvmesh import models

MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
TOOLS_FIRST = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
END_OF_TURN = 2
"""<|im_end|>, the end-of-text token of this model."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory) -> Iterator[Cluster]:
    """A torch pair, and a model whose template says which tools it was offered."""
    models.pull(MODEL)
    cluster = Cluster(tmp_path_factory.mktemp("options"))
    try:
        endpoint = cluster.start_router()
        cluster.begin_worker("p", "prefill", engine="torch")
        cluster.begin_worker("d", "decode", engine="torch")
        template = f"chat_template={TOOLS_FIRST}"
        cluster.begin_worker("t", "both", "--model", "tools", "--engine-arguments", template)
        cluster.wait_live(endpoint, "p", "d", "t")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def client(mesh) -> Iterator[kvmesh.Client]:
    with kvmesh.Client(mesh.endpoints[0]) as connected:
        yield connected
        mesh.wait_empty("p", "d", "t")


def ask(client: kvmesh.Client, **options) -> kvmesh.Result:
    """A greedy answer of at most 12 tokens."""
    given = {"prompt": PROMPT, "max_tokens": 12, "ignore_end_of_text": True, **options}
    return client.complete(model=MODEL, temperature=0, **given)


@pytest.fixture
def plain(client) -> kvmesh.Result:
    """The answer without further wishes, from both workers."""
    result = ask(client)
    assert len(result.token_ids) == 12
    assert result.timings.transferred_bytes > 0
    return result


def test_log_probabilities_come_with_each_token_of_both_workers(client, plain) -> None:
    result = ask(client, logprobs=3)
    assert result.token_ids == plain.token_ids
    assert len(result.logprobs) == 12
    for token_id, told in zip(result.token_ids, result.logprobs, strict=True):
        assert told.top[0] == (token_id, told.logprob)
        values = [value for _, value in told.top]
        assert len(values) == 3
        assert 0 >= values[0] >= values[1] >= values[2]
    only = ask(client, logprobs=0)
    assert [told.logprob for told in only.logprobs] == pytest.approx(
        [told.logprob for told in result.logprobs], abs=1e-4
    )
    assert not any(told.top for told in only.logprobs)
    assert not plain.logprobs


def test_log_probabilities_end_where_a_stop_string_cuts(client, plain) -> None:
    stop = plain.text[-6:-3]
    result = ask(client, logprobs=2, stop=stop)
    assert result.finish_reason == "stop"
    assert result.stop_string == stop
    assert result.text == plain.text[: plain.text.index(stop)]
    count = len(result.token_ids)
    assert result.token_ids == plain.token_ids[:count]
    assert 0 < count < 12
    assert len(result.logprobs) == count


def test_a_stop_string_is_kept_where_that_was_asked(client, plain) -> None:
    stop = plain.text[-6:-3]
    result = ask(client, stop=stop, include_stop=True)
    assert result.stop_string == stop
    assert result.text == plain.text[: plain.text.index(stop) + len(stop)]


def test_a_bias_forces_a_token_on_both_workers(client, plain) -> None:
    forced = next(i for i in range(1_000, 1_100) if i not in plain.token_ids)
    result = ask(client, logit_bias={forced: 100.0}, max_tokens=4)
    assert result.token_ids == (forced,) * 4


def test_a_stop_token_ends_the_answer_and_is_told(client, plain) -> None:
    stop = plain.token_ids[4]
    result = ask(client, stop_token_ids=[stop])
    assert result.finish_reason == "stop"
    assert result.stop_token_id == stop
    assert result.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]


def test_nothing_stops_an_answer_before_its_fewest_tokens(client, plain) -> None:
    stop = plain.token_ids[4]
    held = ask(client, stop_token_ids=[stop], min_tokens=8)
    assert len(held.token_ids) >= 8
    text = plain.text[:3]
    assert len(ask(client, stop=text).token_ids) < 8
    assert len(ask(client, stop=text, min_tokens=8).token_ids) >= 8


def test_special_tokens_are_text_only_where_that_was_asked(client) -> None:
    forced = {"logit_bias": {END_OF_TURN: 100.0}, "max_tokens": 3}
    hidden = ask(client, **forced)
    shown = ask(client, special_tokens=True, **forced)
    assert hidden.token_ids == shown.token_ids == (END_OF_TURN,) * 3
    assert hidden.text == ""
    assert shown.text == "<|im_end|>" * 3
    kept = ask(client, kept_special_tokens=["<|im_end|>", "<none>"], **forced)
    assert kept.text == shown.text
    other = ask(client, kept_special_tokens=["<|im_start|>"], **forced)
    assert other.text == ""


def test_tools_reach_the_template(client) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}

    def answer(content: str, **offered) -> tuple[list[int], kvmesh.Result]:
        said = {"model": "tools", "messages": [{"role": "user", "content": content}], **offered}
        return client.tokenize(**said), client.complete(max_tokens=6, temperature=0, **said)

    ids, result = answer("in Paris?", tools=[tool])
    same_ids, same = answer("weather in Paris?")
    assert ids == same_ids
    assert result.usage.prompt_tokens == len(ids)
    assert result.token_ids == same.token_ids
    assert ids != answer("in Paris?")[0]
