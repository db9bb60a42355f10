"""What an operator sees and may do, from the command line."""

import json
import os
import subprocess
import sys

import pytest

import kvmesh
from kvmesh.cli import main


def test_workers_are_listed_with_the_state_of_their_sessions(pair, capsys) -> None:
    assert main(["workers", "--endpoint", pair.endpoints[0]]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["WORKER", "ROLE", "MODEL", "ENGINE", "STATE"]
    states = {row.split()[0]: row.split()[1:5] for row in rows}
    assert states == {
        "p": ["prefill", "sim", "sim", "live"],
        "d": ["decode", "sim", "sim", "live"],
    }


def test_the_registry_can_be_asked_without_a_router(pair, capsys) -> None:
    assert main(["workers", "--etcd", pair.etcd, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["workerId"] for record in records} == {"p", "d"}


def test_a_decision_is_explained_with_its_terms(pair, client, capsys) -> None:
    result = client.complete(prompt="Why there?", max_tokens=4)
    assert main(["explain", result.generation_id, "--endpoint", pair.endpoints[0]]) == 0
    said = capsys.readouterr().out
    assert "attempt 1" in said
    chosen = next(line for line in said.splitlines() if line.startswith("*"))
    assert {"p", "d"} <= set(chosen.split())
    head = next(line for line in said.splitlines() if "COST MS" in line)
    assert {"WAIT", "PREFILL", "QUEUED", "GAP", "OWN_STRETCH", "RECOMPUTE"} <= set(head.split())
    measured = next(line for line in said.splitlines() if line.startswith("measured"))
    assert "predicted" in said
    assert float(measured.split()[-1]) > 0


def test_a_drain_that_would_empty_a_role_is_refused(pair, client, capsys) -> None:
    assert main(["drain", "d", "--endpoint", pair.endpoints[0]]) == 1
    assert "leave a role without a worker" in capsys.readouterr().err
    assert client.complete(prompt="It serves on", max_tokens=2).token_ids


def test_an_unknown_worker_or_generation_is_told(pair, capsys) -> None:
    assert main(["drain", "nobody", "--endpoint", pair.endpoints[0]]) == 1
    assert "nobody" in capsys.readouterr().err
    assert main(["explain", "0" * 32, "--endpoint", pair.endpoints[0]]) == 1
    assert "no such generation" in capsys.readouterr().err


def test_without_a_router_the_way_out_is_told(capsys) -> None:
    assert main(["generate", "Hi", "--endpoint", "127.0.0.1:1"]) == 1
    assert "kvmesh up" in capsys.readouterr().err
    nobody = kvmesh.Client("127.0.0.1:1")
    with nobody, pytest.raises(kvmesh.MeshUnavailableError) as caught:
        nobody.models(timeout=5)
    # Nobody of ours said that.
    assert caught.value.reason == ""


def test_a_drain_gives_back_what_outlives_its_grace_and_says_which(fresh) -> None:
    endpoint = fresh.start_router()
    fresh.start_worker("a", "both", *fresh.steps())
    fresh.wait_live(endpoint, "a")
    fresh.slow_down()
    with kvmesh.Client(endpoint) as client:
        stream = client.generate(prompt="A long one", max_tokens=400, ignore_end_of_text=True)
        accepted = next(stream)
        assert isinstance(next(stream), kvmesh.Tokens)
        # Nobody is there to take it over.
        assert main(["drain", "a", "--grace", "50ms", "--force", "--endpoint", endpoint]) == 0
        fresh.wait_empty("a")
        fresh.start_worker("b", "both", *fresh.steps())
        fresh.wait_live(endpoint, "b")
        fresh.speed_up()
        # Its client sees nothing of it: another worker goes on.
        *_, last = stream
        assert last.usage.output_tokens == 400
    fresh.wait_empty("a", "b")
    log = fresh.workers["a"].log.read_text()
    (line,) = [line for line in log.splitlines() if "attempt ended" in line]
    assert f"generation={accepted.generation_id} owner=1 attempt=1" in line
    assert "end=returned" in line
    assert "its grace of 0.05 s has ended" in line
    fresh.assert_alive()


def test_the_models_that_are_served_are_listed(pair, client, capsys) -> None:
    (model,) = client.models()
    assert main(["models", "--endpoint", pair.endpoints[0]]) == 0
    assert capsys.readouterr().out == f"sim  ready  context {model.context_length} tokens\n"


def test_the_version_is_told(capsys) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"kvmesh {kvmesh.__version__} (Python 3.")


def test_a_chat_remembers_its_turns_until_a_new_one_begins(pair, client) -> None:
    command = [
        sys.executable, "-m", "kvmesh.cli", "chat",
        "--endpoint", pair.endpoints[0],
        "--system", "Be brief.",
        "--max-tokens", "12",
        "--temperature", "0",
        "--timings",
    ]  # fmt: skip
    typed = "The first\n\nThe second\n/new\nThe first\n/help\n"
    said = subprocess.run(
        command,
        input=typed.encode(),
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert said.returncode == 0, said.stderr

    def answer(*turns: str) -> str:
        roles = ("user", "assistant")
        messages = [{"role": "system", "content": "Be brief."}]
        messages += [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
        return client.complete(messages=messages, max_tokens=12, temperature=0).text

    first = answer("The first")
    second = answer("The first", first, "The second")
    assert second != answer("The second"), "the second turn stands on the first"
    printed = f"{first}\n{second}\n{first}\n".encode()
    assert said.stdout.startswith(printed)
    assert b"/new" in said.stdout.removeprefix(printed)
    assert said.stderr.count(b"first token") == 3
