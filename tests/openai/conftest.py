"""A router that real clients of the OpenAI API ask, and what is behind it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

from behind import CALLER, CODER
from cluster import Cluster


@dataclass(frozen=True)
class Served:
    """A router in front of both."""

    cluster: Cluster
    target: str
    tell: Callable[[str], None]
    """Says a line of control to the mock worker."""
    say: Callable[[str], None]
    """Sets what the models answer that can call tools."""

    @property
    def url(self) -> str:
        return f"http://{self.target}/v1"

    def wait_figures(self, **wanted: float) -> None:
        """Looks until the router's figures have these values."""
        from figures import wait_figures

        wait_figures(self.cluster, self.target, wanted)


# Tells of tools, and has what Hermes's models have for calls.
_CALLER = """\
{% if tools %}{% for tool in tools %}<tool>{{ tool | tojson }}</tool>{% endfor %}{% endif %}\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call | tojson }}\
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{# <think> #}"""
# And one that has what Qwen3-Coder has for them.
_CODER = _CALLER + "{# <function=f><parameter=p> #}"


@contextmanager
def mock_worker(*options: str) -> Iterator[tuple[dict[str, Any], Callable[[str], None]]]:
    """What it says of itself, and how it is told something."""
    from built import testkit

    command = [testkit(), "mock-worker", "--until-stdin-closes", "--max-logprobs", "20"]
    command += ["--step-ms", "2", *options]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())

        def tell(line: str) -> None:
            process.stdin.write(f"{line}\n")
            # Its answer to a question says that it has read what came before.
            process.stdin.write("counters\n")
            process.stdin.flush()
            process.stdout.readline()

        yield ready, tell


@pytest.fixture(scope="session")
def cluster_and_mock(tmp_path_factory) -> Iterator[Served]:
    cluster = Cluster(tmp_path_factory.mktemp("openai"))
    try:
        caller = ["--model", CALLER, "--grammars", "--chat-template", _CALLER]
        coder = ["--model", CODER, "--chat-template", _CODER]
        with (
            mock_worker() as (ready, tell),
            mock_worker(*caller) as (calls, tell_caller),
            mock_worker(*coder) as (codes, tell_coder),
        ):
            workers = ",".join(told["address"] for told in (ready, calls, codes))
            options = ["--workers", workers, "--sse-keep-alive", "50ms"]
            target = cluster.start_router(*options)
            cluster.start_worker("w", "both")
            mocks = [told["worker_id"] for told in (ready, calls, codes)]
            cluster.wait_live(target, "w", *mocks)

            def say(text: str) -> None:
                for tell_one in (tell_caller, tell_coder):
                    tell_one(f"say {json.dumps(text)}")

            yield Served(cluster, target, tell, say)
    finally:
        cluster.close()


@pytest.fixture
def served(cluster_and_mock) -> Iterator[Served]:
    """The same for all, without faults, and empty at the end of each test."""
    yield cluster_and_mock
    cluster_and_mock.tell("heal")
    cluster_and_mock.wait_figures(open_streams=0, bookings=0, undelivered_ids=0)
