"""`curl`, as people try a server."""

import json
import shutil
import subprocess

import pytest
from behind import MOCK, SIM

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def command(served, body: dict, *options: str) -> list[str]:
    head = ["-H", "content-type: application/json", "-d", json.dumps(body)]
    return ["curl", "-sS", "--max-time", "60", *options, *head, f"{served.url}/completions"]


def ask(served, body: dict, *options: str) -> str:
    asked = command(served, body, *options)
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("protocol", ["--http1.1", "--http2-prior-knowledge"])
def test_events_come_line_by_line_over_both_protocols(served, protocol):
    body = {"model": SIM, "prompt": [20, 21, 22], "max_tokens": 12, "seed": 1}
    whole = json.loads(ask(served, body, protocol))
    text = ask(served, {**body, "stream": True}, protocol, "-N")
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data")]
    assert lines.pop() == "[DONE]"
    said = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    assert said == whole["choices"][0]["text"]


def test_curl_that_is_killed_is_cancelled(served):
    body = {"model": MOCK, "prompt": "hello", "max_tokens": 100_000, "stream": True}
    with subprocess.Popen(command(served, body, "-N"), stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        assert curl.stdout.readline().startswith(b"data: ")
        curl.kill()
    served.wait_figures(open_streams=0, open_attempts=0)


def test_a_refusal_can_be_read(served):
    said = ask(served, {"model": "none", "prompt": "x"}, "-i")
    assert "404 Not Found" in said
    assert '"code":"model_not_found"' in said
