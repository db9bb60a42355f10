"""Clients in other languages, and what they are run against."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from needs import need

from kvmesh.cli.etcd import find_etcd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "e2e"))

# A client: options by name in, the JSON object that it printed out.
Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Endpoint:
    """Something that serves kvmesh.v1.Inference and is registered in etcd."""

    etcd: str
    cluster: str
    target: str
    model: str
    processes: Any
    """The `Cluster` that it is part of."""


@pytest.fixture(scope="session", params=["worker", "mesh"])
def endpoint(request, tmp_path_factory) -> Iterator[Endpoint]:
    """A mock worker that answers by itself, and a router with a worker behind it."""
    from cluster import Cluster

    cluster = Cluster(tmp_path_factory.mktemp(request.param))
    try:
        if request.param == "worker":
            with mock_worker() as (target, _):
                register(cluster.etcd, target)
                yield Endpoint(cluster.etcd, "default", target, "mock", cluster)
        else:
            target = cluster.start_router()
            cluster.start_worker("w", "both")
            cluster.wait_live(target, "w")
            model = cluster.table(target)["w"].record.model.name
            yield Endpoint(cluster.etcd, "default", target, model, cluster)
    finally:
        cluster.close()


@contextmanager
def mock_worker(*options: str) -> Iterator[tuple[str, str]]:
    """Address and name of a mock worker; it ends with its standard input."""
    from built import testkit

    command = [testkit(), "mock-worker", "--until-stdin-closes", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield ready["address"], ready["worker_id"]


@pytest.fixture
def caller(tmp_path) -> Iterator[str]:
    """A router whose model, "caller", answers with a tool call."""
    from cluster import Cluster

    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    template = "{{ tools }}{{ messages }}{# <tool_call> #}"
    says = ["--model", "caller", "--chat-template", template]
    says += ["--say", f"<tool_call>{call}</tool_call>"]
    cluster = Cluster(tmp_path)
    try:
        with mock_worker(*says) as (address, name):
            target = cluster.start_router("--workers", address)
            cluster.wait_live(target, name)
            yield target
    finally:
        cluster.close()


def register(etcd: str, target: str) -> None:
    """Puts an address where routers put theirs."""
    etcd_binary = find_etcd()
    assert etcd_binary, "etcd is missing: make installs it, KVMESH_ETCD_BIN names one"
    etcdctl = Path(etcd_binary).with_name("etcdctl")
    key = f"kvmesh/v1/default/routers/{target}"
    subprocess.run(
        [etcdctl, f"--endpoints={etcd}", "put", key, json.dumps({"Addr": target})],
        check=True,
        capture_output=True,
        env={**os.environ, "ETCDCTL_API": "3"},
    )


def run(*command: str | Path) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@contextmanager
def running(*command: str | Path) -> Iterator[dict[str, Any]]:
    """What a client printed that lives until its standard input closes."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "it ended without a word"
        yield json.loads(line)
    assert process.returncode == 0


@pytest.fixture(scope="session")
def go_client() -> Run:
    """The Go client, built."""
    need("Go", "go")
    binary = HERE / "go" / "bin" / "interop"
    subprocess.run(["go", "build", "-o", binary, "."], cwd=HERE / "go", check=True)
    return lambda **options: run(binary, *(f"-{name}={value}" for name, value in options.items()))


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """The Node clients, their packages installed."""
    need("Node", "node", "npm")
    folder = HERE / "node"
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True)
    return folder


def node_command(file: Path, options: Mapping[str, object]) -> list[str | Path]:
    return ["node", file, *(f"--{name}={value}" for name, value in options.items())]


def node(file: Path) -> Run:
    return lambda **options: run(*node_command(file, options))


@pytest.fixture(scope="session")
def node_client(node_folder) -> Run:
    """The client with a stub made from proto/."""
    return node(node_folder / "main.js")


@pytest.fixture(scope="session")
def node_openai(node_folder) -> Run:
    """The client that speaks OpenAI's HTTP."""
    return node(node_folder / "openai.js")


@pytest.fixture(scope="session")
def node_openai_held(node_folder) -> Callable[..., AbstractContextManager[dict[str, Any]]]:
    """The same, alive as long as its context."""
    file = node_folder / "openai.js"
    return lambda **options: running(*node_command(file, options | {"hold": "yes"}))
