"""What clients say, and what they show, is in no log, no figure and no error."""

import json
import urllib.error
import urllib.request

import pytest

import kvmesh
from kvmesh.cli import main

PROMPT, TOKEN, GUESS = "whale-of-a-prompt", "whale-token-" * 4, "kvmesh-whale-of-a-key"


def key(capsys, file, *who: str) -> str:
    assert main(["key", *who]) == 0
    made = capsys.readouterr()
    with file.open("a") as lines:
        lines.write(made.out)
    return made.err.split()[-1]


def openai(endpoint: str, token: str, body: bytes) -> str:
    """What OpenAI's face says to a body, whatever that is."""
    asked = urllib.request.Request(
        f"http://{endpoint}/v1/chat/completions",
        body,
        {"authorization": f"Bearer {token}", "content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


def test_prompts_keys_and_tokens_are_told_to_nobody(fresh, tmp_path, capsys) -> None:
    keys, token = tmp_path / "keys.toml", tmp_path / "token"
    shop, operator = key(capsys, keys, "shop"), key(capsys, keys, "--operator")
    token.write_text(TOKEN)
    own = ("--cluster-token-file", str(token), "--log-level", "debug")
    endpoint = fresh.start_router(
        *own, "--api-keys", str(keys), "--admin-listen", "127.0.0.1:0",
        "--quarantine-time", "1m",
    )  # fmt: skip
    router = fresh.routers[endpoint]
    admin = fresh.children.wait_for(router, "operators are answered on ")
    fresh.start_worker("p", "prefill", *own)
    fresh.start_worker("d", "decode", *own)
    said: list[str] = []
    with kvmesh.Client(endpoint, token=shop) as client:
        while not any(model.ready for model in client.models()):
            fresh.children.wait(0.02)
        result = client.complete(prompt=f"{PROMPT} whole", max_tokens=200, ignore_end_of_text=True)
        # Long enough that nothing else says the same.
        answer = result.text[20:120]
        assert len(answer) > 40
        with pytest.raises(kvmesh.MeshError) as refused:
            client.complete(prompt=f"{PROMPT} " * 50_000, max_tokens=4)
        said.append(str(refused.value))
        with pytest.raises(kvmesh.MeshError) as refused:
            client.complete(prompt=PROMPT, max_tokens=4, temperature=-1)
        said.append(str(refused.value))
        stream = client.generate(
            prompt=f"{PROMPT} moved", max_tokens=2_000, ignore_end_of_text=True
        )
        events = [next(stream), next(stream)]
        # What is lost with a worker is told in many lines.
        fresh.kill("d")
        fresh.start_worker("e", "decode", *own)
        assert len(events) + len(list(stream)) > 2
        stream = client.generate(prompt=f"{PROMPT} left", max_tokens=2_000, ignore_end_of_text=True)
        next(stream)
        stream.close()
    with kvmesh.Client(endpoint, token=GUESS) as client:
        with pytest.raises(kvmesh.MeshError) as refused:
            client.complete(prompt=PROMPT, max_tokens=4)
        said.append(str(refused.value))
    message = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
    for bearer in (shop, GUESS):
        answered = openai(endpoint, bearer, json.dumps(message).encode())
        assert ("choices" in answered) is (bearer == shop)
        said.append(answered)
        for wrong in ({**message, "temperature": 99}, {**message, "max_tokens": "8"}):
            said.append(openai(endpoint, bearer, json.dumps(wrong).encode()))
        said.append(openai(endpoint, bearer, json.dumps(message).encode()[:-9]))
    for asked in (["workers"], ["explain", result.generation_id]):
        assert main([*asked, "--endpoint", admin, "--token", operator]) == 0
        assert main([*asked, "--endpoint", endpoint, "--token", operator]) == 1
        told = capsys.readouterr()
        said += [told.out, told.err]
    figures = urllib.request.Request(
        f"http://{admin}/metrics", headers={"authorization": f"Bearer {operator}"}
    )
    with urllib.request.urlopen(figures, timeout=60) as answer_:
        said.append(answer_.read().decode())
    assert "kvmesh_calls_total" in said[-1]

    for name in ("p", "e"):
        fresh.stop(name)
    fresh.children.stop(fresh.routers.pop(endpoint), 60)
    logs = {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()}
    assert "DEBUG" in logs["router-0.log"]
    assert "attempt ended" in logs["p.log"]
    texts = {**logs, **{f"answer {n}": text for n, text in enumerate(said)}}
    for name, text in texts.items():
        for secret in (PROMPT, "whale", answer, shop, operator, TOKEN, GUESS):
            assert secret not in text, f"{secret!r} is in {name}"
