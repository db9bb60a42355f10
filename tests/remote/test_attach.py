"""`kvmesh attach` as a process, between a real router and servers of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import START_S, Cluster
from fake_core import tokens_after
from fake_model import MODEL, files
from figures import figures, wait_quiet
from many_streams import Streams, prompts

import kvmesh
from kvmesh.cli import main
from kvmesh.cli.children import Child
from kvmesh.v1 import admin_pb2

FOLDER = Path(__file__).parent
COUNT = 8
STEP_MS = 10
SCHEMES = {"smg": "vllm", "first_party": "vllm", "openai": "http"}


class Mesh(Cluster):
    """A cluster whose workers are servers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ttl_s=2)
        self.servers: dict[str, tuple[Child, str]] = {}
        self.tokenizer = folder / "model"
        self.tokenizer.mkdir()
        for name, content in files().items():
            (self.tokenizer / name).write_bytes(content)

    def start_server(self, name: str, wire: str, port: int = 0) -> str:
        """A server; its address."""
        program = str(FOLDER / f"fake_{wire}.py")
        child = self.children.spawn(
            name, [sys.executable, program, str(port), str(STEP_MS), str(self.slow_file)]
        )
        deadline = time.monotonic() + START_S
        log = self.folder / "logs" / f"{name}.log"
        while "listening on " not in (text := log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, text
            self.children.wait(0.02)
        address = text.rpartition("listening on ")[2].split()[0]
        self.servers[name] = child, address
        return f"{SCHEMES[wire]}://{address}"

    def attach(self, name: str, server: str, *arguments: str) -> Child:
        child = self.children.spawn(
            name,
            [
                sys.executable, "-m", "kvmesh.cli", "attach", server,
                "--worker-id", name,
                "--tokenizer", str(self.tokenizer),
                # Both wires serve one model; only one of them tells its size in full.
                "--model-digest", "ab" * 32,
                "--etcd", self.etcd,
                "--etcd-ttl", str(self.ttl_s),
                *arguments,
            ],
            announce=True,
        )  # fmt: skip
        self.workers[name] = child
        return child

    def kill_server(self, name: str) -> str:
        """kill -9; its address."""
        child, address = self.servers.pop(name)
        self._kill(child)
        return address


@pytest.fixture
def mesh(tmp_path):
    made = Mesh(tmp_path)
    try:
        yield made
    finally:
        made.close()


def assert_undisturbed(streams: Streams) -> None:
    for prompt, output in zip(streams.asked, streams.join(), strict=True):
        assert output == tokens_after(prompt, streams.tokens)


@pytest.mark.parametrize("wire", SCHEMES)
def test_a_killed_servers_streams_are_finished_by_another_one(mesh, wire) -> None:
    endpoint = mesh.start_router()
    for name in ("a", "b"):
        mesh.attach(name, mesh.start_server(f"server-{name}", wire))
    mesh.wait_live(endpoint, "a", "b")
    with kvmesh.Client(endpoint) as client:
        (model,) = client.models()
        # Its wire does not say how it computes, so that nothing more is promised than that
        # streams go on validly.
        assert model.ready
        assert not model.reproducible
    mesh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 150)
    streams.wait(10)
    victim = busiest(mesh, endpoint)
    address = mesh.kill_server(f"server-{victim}")
    mesh.speed_up()
    assert_undisturbed(streams)
    assert sum(attempts > 1 for attempts in streams.attempts()) > 0
    now = figures(endpoint)
    assert now["failed_total"] == now["violations_total"] == 0
    # Its worker goes, and comes back with it.
    mesh.wait_table(endpoint, lambda table: victim not in table or not live(table[victim]))
    mesh.start_server(f"again-{victim}", wire, int(address.rpartition(":")[2]))
    mesh.wait_table(endpoint, lambda table: victim in table and live(table[victim]))
    more = Streams(endpoint, prompts(COUNT, seed=2), 30)
    assert_undisturbed(more)
    mesh.assert_alive()


def test_a_frozen_servers_streams_are_finished_by_another_one(mesh) -> None:
    endpoint = mesh.start_router()
    for name in ("a", "b"):
        mesh.attach(name, mesh.start_server(f"server-{name}", "smg"))
    mesh.wait_live(endpoint, "a", "b")
    mesh.slow_down()
    streams = Streams(endpoint, prompts(COUNT), 200)
    streams.wait(10)
    victim = busiest(mesh, endpoint)
    frozen, _ = mesh.servers[f"server-{victim}"]
    os.kill(frozen.process.pid, signal.SIGSTOP)
    mesh.speed_up()
    try:
        assert_undisturbed(streams)
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
    assert sum(attempts > 1 for attempts in streams.attempts()) > 0
    # What was cancelled meanwhile has ended there once it runs again.
    wait_quiet(mesh, endpoint, "a", "b")
    mesh.assert_alive()


def busiest(mesh: Mesh, endpoint: str) -> str:
    """The worker that decodes the most streams, of which one does."""
    table = mesh.wait_table(
        endpoint, lambda table: any(row.load.own.decoding for row in table.values())
    )
    return max(("a", "b"), key=lambda name: table[name].load.own.decoding)


def live(worker) -> bool:
    return worker.state == admin_pb2.SESSION_STATE_LIVE


def test_keys_need_a_server_that_takes_salted_prompts(mesh, tmp_path, capsys) -> None:
    assert main(["key", "shop"]) == 0
    said = capsys.readouterr()
    keys = tmp_path / "keys.toml"
    keys.write_text(said.out)
    endpoint = mesh.start_router("--api-keys", str(keys))
    mesh.attach("bare", mesh.start_server("server-bare", "smg"))
    (prompt,) = prompts(1)
    with kvmesh.Client(endpoint, token=said.err.split()[-1]) as client:
        while not any(model.ready for model in client.models()):
            mesh.children.wait(0.02)
        with pytest.raises(kvmesh.MeshError, match="--salted-prompts") as refused:
            client.complete(token_ids=prompt, max_tokens=5)
        assert refused.value.reason == "UNSUPPORTED"
        mesh.attach(
            "shared", mesh.start_server("server-shared", "smg"), "--salted-prompts", "shared"
        )

        def tried():
            try:
                return client.complete(token_ids=prompt, max_tokens=5, ignore_end_of_text=True)
            except kvmesh.MeshError as error:
                return error.reason

        deadline = time.monotonic() + START_S
        while (result := tried()) == "UNSUPPORTED":
            assert time.monotonic() < deadline
            mesh.children.wait(0.02)
        assert [*result.token_ids] == tokens_after(prompt, 5)
        assert result.usage.attempts == 1
    mesh.assert_alive()


def test_a_server_that_is_not_there_yet_is_waited_for(mesh) -> None:
    server = mesh.start_server("server", "smg")
    address = mesh.kill_server("server")
    endpoint = mesh.start_router()
    child = mesh.attach("a", server)
    while not any(": waits for vllm://" in line for line in child.said):
        mesh.children.wait(START_S)
    mesh.start_server("again", "smg", int(address.rpartition(":")[2]))
    mesh.wait_live(endpoint, "a")
    with kvmesh.Client(endpoint) as client:
        (prompt,) = prompts(1)
        result = client.complete(token_ids=prompt, max_tokens=5, ignore_end_of_text=True)
        assert [*result.token_ids] == tokens_after(prompt, 5)
        assert result.model == MODEL
    wait_quiet(mesh, endpoint, "a")


def test_it_can_be_stopped_while_it_waits(mesh) -> None:
    server = mesh.start_server("server", "smg")
    mesh.kill_server("server")
    child = mesh.attach("a", server)
    while not any(": waits for vllm://" in line for line in child.said):
        mesh.children.wait(START_S)
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.process.wait(START_S) == 0
    mesh.forget("a")


def test_a_drain_lets_streams_end_there(mesh) -> None:
    endpoint = mesh.start_router()
    mesh.attach("a", mesh.start_server("server", "smg"))
    mesh.wait_live(endpoint, "a")
    streams = Streams(endpoint, prompts(2), 60)
    streams.wait(5)
    os.kill(mesh.workers["a"].process.pid, signal.SIGTERM)
    assert_undisturbed(streams)
    assert streams.attempts() == [1, 1]
    mesh.forget("a")


def test_a_wrong_address_says_what_is_allowed() -> None:
    command = [sys.executable, "-m", "kvmesh.cli", "attach"]
    for server, text in (("ftp://x:1", "allowed are vllm://"), ("vllm://x", "allowed are vllm://")):
        done = subprocess.run([*command, server], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert text in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "server is not given" in done.stderr
