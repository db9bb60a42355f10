"""What must not be asked is refused by name, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cluster import Cluster
from figures import figures, wait_figures, wait_quiet
from held import held, wait_held
from raw_http2 import ConnectionEndedError, RawHttp2, message, prefixed

import kvmesh
from kvmesh.v1 import inference_pb2, worker_pb2, worker_pb2_grpc

MB = 1_000_000
INVALID, EXHAUSTED, OK = (
    code.value[0]
    for code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.OK,
    )
)
RAISES = "{{ raise_exception('roles must alternate') }}"
LOOPS = (
    "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
GARBAGE = (
    b"\x00\xff\x13garbage\r\n\r\n",
    b"PRI",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrubbish, and more of it",
    b"GET / HT",
    bytes(range(256)) * 300,
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory) -> Iterator[Cluster]:
    """A pair, and two models whose templates fail; patience is short."""
    cluster = Cluster(tmp_path_factory.mktemp("bad-input"))
    try:
        endpoint = cluster.start_router("--request-read-timeout", "5s", "--handshake-timeout", "5s")
        cluster.start_worker("p", "prefill", "--model", "sim")
        cluster.start_worker("d", "decode", "--model", "sim")
        for name, template in (("raises", RAISES), ("loops", LOOPS)):
            cluster.start_worker(
                name, "both", "--model", name, "--engine-arguments", f"chat_template={template}"
            )
        cluster.wait_live(endpoint, *WORKERS)
        yield cluster
    finally:
        cluster.close()


WORKERS = ("p", "d", "raises", "loops")


@pytest.fixture
def client(mesh) -> Iterator[kvmesh.Client]:
    """A client; after the test nobody has died, nothing is left, and all work."""
    with kvmesh.Client(mesh.endpoints[0]) as connected:
        yield connected
        mesh.assert_alive()
        wait_quiet(mesh, mesh.endpoints[0], *WORKERS)
        assert len(connected.complete(prompt="Hi", model="sim", max_tokens=3).token_ids) == 3


def rejected(mesh: Cluster, step: str, reason: str) -> float:
    return figures(mesh.endpoints[0]).total("rejected_total", step=step, reason=reason)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [2_000]}, "token_ids"),
        ({"messages": []}, "chat.messages"),
        ({"prompt": "a", "temperature": -1.0}, "sampling.temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "sampling.temperature"),
        ({"prompt": "a", "temperature": float("inf")}, "sampling.temperature"),
        ({"prompt": "a", "top_p": float("nan")}, "sampling.top_p"),
        ({"prompt": "a", "top_p": -0.5}, "sampling.top_p"),
        ({"prompt": "a", "min_p": float("nan")}, "sampling.min_p"),
        ({"prompt": "a", "repetition_penalty": -1.0}, "sampling.repetition_penalty"),
        ({"prompt": "a", "frequency_penalty": float("nan")}, "sampling.frequency_penalty"),
        ({"prompt": "a", "presence_penalty": float("-inf")}, "sampling.presence_penalty"),
        ({"prompt": "a", "logit_bias": {1: float("nan")}}, "sampling.logit_bias"),
        ({"prompt": "a", "logit_bias": {2_000: 1.0}}, "sampling.logit_bias"),
        ({"prompt": "a", "stop": ["x"] * 1_000}, "stopping.stop"),
        ({"prompt": "a", "stop": ["x" * 2_000]}, "stopping.stop"),
        ({"prompt": "a", "max_tokens": 140_000}, "stopping.max_tokens"),
        ({"token_ids": [5] * 140_000}, "token_ids"),
    ],
)
def test_a_wrong_field_is_named(client, options, field) -> None:
    with pytest.raises(kvmesh.InvalidRequestError) as caught:
        client.complete(model="sim", **options)
    named = [re.sub(r"\[\d+\]", "", violation.field) for violation in caught.value.violations]
    assert any(name == field or name.startswith(field + ".") for name in named), named
    assert caught.value.reason == "INVALID_FIELD"


def test_a_prompt_over_the_context_is_refused_with_the_limit(client) -> None:
    with pytest.raises(kvmesh.InvalidRequestError) as caught:
        # Each of these bytes is a token of its own: only the tokeniser can tell.
        client.complete(model="sim", prompt="\u00ff" * 100_000, max_tokens=1)
    assert "131072" in str(caught.value) or "32768" in str(caught.value)


def test_a_prompt_over_every_pool_is_refused_with_the_limit(mesh, client) -> None:
    (pool,) = {mesh.info(name).record.capabilities.pool_blocks * 16 for name in ("p", "d")}
    with pytest.raises(kvmesh.InvalidRequestError, match=str(pool)) as caught:
        client.complete(model="sim", token_ids=[5] * (pool + 1), max_tokens=1)
    assert caught.value.reason == "PROMPT_TOO_LONG"
    assert caught.value.metadata["limit"] == str(pool)
    assert [violation.field for violation in caught.value.violations] == ["prompt"]


def test_an_unknown_model_is_not_found(client) -> None:
    with pytest.raises(kvmesh.ModelNotFoundError) as caught:
        client.complete(prompt="a", model="none-such")
    assert "sim" in caught.value.metadata["models"]
    with pytest.raises(kvmesh.ModelNotFoundError):
        # There are three, so the name is needed.
        client.complete(prompt="a")


def test_20_mb_are_refused_by_their_length_alone(mesh, client) -> None:
    before = rejected(mesh, "size", "MESSAGE_TOO_LARGE")
    with RawHttp2(mesh.endpoints[0]) as raw:
        prefix = prefixed(b"")[:1] + (20 * MB).to_bytes(4, "big")
        stream = raw.call(prefix + b"\x12" * 1_000, end=False)
        # The rest is never sent.
        assert raw.status(stream) == EXHAUSTED
    assert rejected(mesh, "size", "MESSAGE_TOO_LARGE") == before + 1
    with pytest.raises(kvmesh.MeshError) as caught:
        client.complete(prompt="a" * 20 * MB, model="sim", max_tokens=1)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.metadata["limit"] == str(16 << 20)
    assert caught.value.retry_after_s is None


def test_10_mb_are_read_and_refused_before_the_tokeniser(mesh, client) -> None:
    before = rejected(mesh, "bound", "INVALID_FIELD")
    with pytest.raises(kvmesh.InvalidRequestError) as caught:
        client.complete(prompt="a" * 10 * MB, model="sim", max_tokens=1)
    assert [violation.field for violation in caught.value.violations] == ["prompt"]
    assert rejected(mesh, "bound", "INVALID_FIELD") == before + 1
    assert rejected(mesh, "tokenize", "INVALID_FIELD") == 0


def test_a_prompt_that_is_not_utf8_is_malformed(mesh, client) -> None:
    with RawHttp2(mesh.endpoints[0]) as raw:
        # Field 1 (model), then field 2 (prompt): two bytes that are no UTF-8.
        broken = prefixed(b"\x0a\x03sim\x12\x02\xff\xfe")
        assert raw.status(raw.call(broken)) == INVALID
        # Neither is a stop string, nor bytes that are no message at all.
        assert raw.status(raw.call(prefixed(b"\x3a\x04\x1a\x02\xff\xfe"))) == INVALID
        assert raw.status(raw.call(prefixed(b"\xff" * 40))) == INVALID
        # A compressed message without a name for how.
        assert raw.status(raw.call(b"\x01\0\0\0\x02ab")) not in (OK, None)


@pytest.mark.parametrize(("model", "text"), [("raises", "roles must alternate"), ("loops", "fuel")])
def test_a_template_that_fails_fails_alone(client, model, text) -> None:
    with pytest.raises(kvmesh.MeshError) as caught:
        client.complete(messages=[{"role": "user", "content": "Hi"}], model=model)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert text in caught.value.message
    assert len(caught.value.message) <= 1_024
    # Its worker is not blamed.
    assert client.complete(prompt="Hi", model=model, max_tokens=2).token_ids


def test_half_a_request_then_silence_or_a_lost_connection(mesh, client) -> None:
    whole = message(inference_pb2.GenerateRequest(model="sim", prompt="x" * 10_000))
    with RawHttp2(mesh.endpoints[0]) as raw:
        # Silence: the router's patience ends.
        assert raw.status(raw.call(whole[:5_000], end=False)) == INVALID
        # The stream's end in the middle.
        assert raw.status(raw.call(whole[:5_000], end=True)) == INVALID
        assert raw.status(raw.call(b"", end=True)) not in (OK, None)
        assert raw.status(raw.call(whole[:3], end=True)) not in (OK, None)
    for give_up in (RawHttp2.vanish, lambda raw: raw.socket.close(), lambda raw: raw.reset(1)):
        raw = RawHttp2(mesh.endpoints[0])
        raw.call(whole[:5_000], end=False)
        wait_until_held(mesh)
        give_up(raw)
        wait_figures(mesh, mesh.endpoints[0], {"request_bytes_held": 0})
        raw.socket.close()


def wait_until_held(mesh: Cluster) -> None:
    """Waits until the router has begun to read a message."""
    for _ in range(500):
        if figures(mesh.endpoints[0]).total("request_bytes_held"):
            return
        mesh.children.wait(0.02)
    raise AssertionError("the router never read the prefix")


def test_garbage_on_the_routers_port(mesh, client) -> None:
    for garbage in GARBAGE:
        send_garbage(socket.AF_INET, tcp(mesh.endpoints[0]), garbage)
    wait_figures(mesh, mesh.endpoints[0], {"open_streams": 0})


def test_garbage_on_every_port_of_a_worker(mesh, client) -> None:
    stream = client.generate(
        prompt="Undisturbed", model="sim", max_tokens=400, ignore_end_of_text=True
    )
    # From its second token on all connections between the two are there.
    for event in stream:
        if isinstance(event, kvmesh.Tokens) and event.first_index + len(event.ids) > 1:
            break
    for name in ("p", "d"):
        pid = mesh.workers[name].process.pid
        transfer = mesh.info(name).record.transfer_address
        before = len(os.listdir(f"/proc/{pid}/fd"))
        for garbage in GARBAGE:
            send_garbage(socket.AF_INET, tcp(mesh.worker_address(name)), garbage)
            send_garbage(socket.AF_INET, tcp(transfer), garbage)
            for abstract in listening_unix(pid):
                send_garbage(socket.AF_UNIX, abstract, garbage)
        wait_descriptors(mesh, pid, before)
    *_, last = stream
    assert isinstance(last, kvmesh.Finished)
    assert last.usage.output_tokens == 400
    moved = client.complete(prompt="Blocks still move. " * 20, model="sim", max_tokens=2)
    assert moved.timings.transferred_bytes > 0


def tcp(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def send_garbage(family: int, address: tuple[str, int] | str, garbage: bytes) -> None:
    """Sends bytes that mean nothing; how the peer ends it is its own affair."""
    with socket.socket(family, socket.SOCK_STREAM) as link:
        link.settimeout(5)
        try:
            link.connect(address)
            link.sendall(garbage)
            link.shutdown(socket.SHUT_WR)
            while link.recv(1 << 16):
                pass
        except OSError:
            return


def listening_unix(pid: int) -> list[str]:
    """Names of the abstract sockets that a process listens on."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    # 10000 in the flags: it listens.
    names = [
        "\0" + row[7][1:]
        for row in rows
        if f"socket:[{row[6]}]" in own
        and len(row) > 7
        and row[7][0] == "@"
        and row[3] == "00010000"
    ]
    assert names, "no abstract socket: does the transfer listen elsewhere?"
    return names


def wait_descriptors(mesh: Cluster, pid: int, most: int) -> None:
    for _ in range(500):
        if (now := len(os.listdir(f"/proc/{pid}/fd"))) <= most:
            return
        mesh.children.wait(0.02)
    raise AssertionError(f"{now} descriptors, {most} before the garbage")


def test_an_attach_that_makes_no_sense_ends_alone(mesh, client) -> None:
    stub = worker_pb2_grpc.WorkerStub(mesh.channel(mesh.worker_address("d")))
    strange = [
        worker_pb2.RouterFrame(),
        worker_pb2.RouterFrame(hello=worker_pb2.RouterHello()),
    ]
    for first in strange:
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Attach(iter([first]), timeout=20))
        assert caught.value.code() not in (
            grpc.StatusCode.UNKNOWN,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )


def reset_all_but_some(endpoint: str, count: int) -> int:
    """Calls on one connection that are reset at once, but for each 51st: those end well. How many
    those are."""
    request = inference_pb2.GenerateRequest(
        model="sim",
        prompt="Reset",
        stopping=inference_pb2.Stopping(max_tokens=12, ignore_end_of_text=True),
    )
    body = message(request)
    kept = set()
    with RawHttp2(endpoint) as raw:
        for number in range(count):
            stream = raw.call(body)
            if number % 51 == 0:
                kept.add(stream)
            else:
                raw.reset(stream)
        assert raw.statuses(kept) == dict.fromkeys(kept, OK)
    return len(kept)


def test_a_rapid_reset_leaves_the_others_alone(mesh, client) -> None:
    endpoint = mesh.endpoints[0]
    # What is kept for the next ones, as connections are, is there from the first ones on.
    reset_all_but_some(endpoint, 510)
    wait_quiet(mesh, endpoint, *WORKERS)
    before = held(mesh)
    assert reset_all_but_some(endpoint, 5_100) == 100
    wait_quiet(mesh, endpoint, *WORKERS)
    wait_held(mesh, before)


def test_a_connection_refused_for_its_rubbish_is_closed(mesh, client) -> None:
    with RawHttp2(mesh.endpoints[0]) as raw:
        raw.socket.sendall(b"\xff" * 4_096)
        with pytest.raises((ConnectionEndedError, ConnectionError)):
            raw.read_to_end()


def test_an_unknown_method_is_unimplemented(mesh, client) -> None:
    with RawHttp2(mesh.endpoints[0]) as raw:
        answer = raw.status(raw.call(prefixed(b""), path="/kvmesh.v1.Inference/NoSuch"))
    assert answer == grpc.StatusCode.UNIMPLEMENTED.value[0]
