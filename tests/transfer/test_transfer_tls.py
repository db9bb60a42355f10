"""TLS between the transfer ports of workers, with certificates out of files."""

import os
import socket
import ssl

import pytest
from authority import Authority, Issued
from test_transfer import hand_off

from kvmesh import _router
from kvmesh.v1 import worker_pb2 as wire

WORKER = "URI:kvmesh://default/worker/"


def tls(authority: Authority, name: str, issued: Issued | None = None) -> _router.PeerTls:
    issued = issued or authority.issue(name, WORKER + name)
    files = (issued.certificate, issued.key, authority.ca)
    return _router.PeerTls(*map(str, files), "default", name)


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "certificates")


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shm", "tcp"])
@pytest.mark.parametrize("block_bytes", [1, 1000, 16384, 65536, 753664])
def test_blocks_arrive_as_they_were_under_tls(nodes, authority, shared_memory, block_bytes) -> None:
    settings = {"block_bytes": block_bytes, "shared_memory": shared_memory}
    a = nodes("a", tls=tls(authority, "a"), **settings)
    b = nodes("b", tls=tls(authority, "b"), **settings)
    a.fill()
    for seed in range(3):
        a.fill(seed)
        event = hand_off(a, b, [3, 1, 9, 15], [0, 7, 4], tokens=53, from_token=16)
        assert event.shared_memory is shared_memory
        assert (b.content[[0, 7, 4]] == a.content[[1, 9, 15]]).all()
    assert a.idle()
    assert b.idle()


def test_the_token_is_asked_for_besides(nodes, authority, tmp_path) -> None:
    def token(name: str) -> _router.ClusterToken:
        file = tmp_path / name
        file.write_text(name * 16)
        return _router.ClusterToken(str(file))

    a, b = (nodes(name, tls=tls(authority, name), token=token("s")) for name in "ab")
    other = nodes("c", tls=tls(authority, "c"), token=token("t"))
    other.pull(os.urandom(16), a, 0, [0])
    assert other.expect(_router.ReceiveFailed).reason == "lost"
    assert hand_off(a, b, [0], [0], tokens=16).kv_tokens == 16


def test_only_workers_of_the_cluster_exchange_kv(nodes, authority, tmp_path) -> None:
    a = nodes("a", tls=tls(authority, "a"))
    plain = nodes("plain")
    stranger = nodes("stranger", tls=tls(Authority(tmp_path / "other"), "stranger"))
    # It answers to another name than its certificate has.
    liar = nodes("liar", tls=tls(authority, "honest"))
    for other, said in ((plain, "TLS"), (stranger, "TLS"), (liar, "certificate of worker")):
        for receiver, sender in ((other, a), (a, other)):
            receiver.pull(os.urandom(16), sender, 0, [0])
            failed = receiver.expect(_router.ReceiveFailed)
            assert failed.reason == "untrusted", failed.message
            assert said in failed.message
            assert receiver.node.figures()["untrusted"] >= 1
    received = plain.node.figures()["receives_failed"]
    assert (received, plain.node.figures()["receives_committed"]) == (1, 0)


def test_a_router_gets_no_kv(authority, nodes) -> None:
    # A worker's settings refuse such a certificate; whoever has one speaks TLS himself.
    a = nodes("a", tls=tls(authority, "a"))
    host, port = a.address.split(":")

    def said(shows: Issued | None) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(authority.ca)
        context.set_alpn_protocols(["kvmesh-transfer"])
        if shows:
            context.load_cert_chain(shows.certificate, shows.key)
        with (
            socket.create_connection((host, int(port)), timeout=20) as plain,
            context.wrap_socket(plain) as stream,
        ):
            try:
                return stream.recv(1024)
            except ssl.SSLError as error:
                return str(error).encode()

    router = said(authority.issue("r", "URI:kvmesh://default/router/r"))
    assert b"it is of router r, worker (any) was to be there" in router
    assert b"CERTIFICATE_REQUIRED" in said(None).replace(b" ", b"_").upper()


def test_changed_certificates_are_for_the_next_connections(nodes, authority, tmp_path) -> None:
    issued = authority.issue("a", WORKER + "a")
    files = tls(authority, "a", issued)
    a = nodes("a", tls=files)
    # The worker's gRPC port looks at the files, for both ports.
    port = _router.WorkerPort("127.0.0.1:0", tls=files)
    record = wire.WorkerRecord(worker_id="a", incarnation=1, address=f"127.0.0.1:{port.port}")
    port.load(record.SerializeToString())
    b = nodes("b", tls=tls(authority, "b"))
    assert hand_off(a, b, [0], [0], tokens=16).kv_tokens == 16
    # `a` takes another authority's word, and shows what that has signed.
    other = Authority(tmp_path / "other")
    renewed = other.issue("a", WORKER + "a")
    authority.ca.write_bytes(authority.ca.read_bytes() + other.ca.read_bytes())
    issued.certificate.write_bytes(renewed.certificate.read_bytes())
    issued.key.write_bytes(renewed.key.read_bytes())
    c = nodes("c", tls=tls(other, "c"))

    def refused() -> str:
        transfer_id = os.urandom(16)
        a.node.offer(transfer_id)
        c.pull(transfer_id, a, 0, [0])
        a.node.ready(transfer_id, 0, [1])
        a.node.commit(transfer_id, 16)
        while True:
            c.node.wait(20)
            for event in c.node.poll():
                if isinstance(event, _router.ReceiveFailed):
                    a.node.abort(transfer_id)
                    return event.reason
                if isinstance(event, _router.Committed):
                    return ""

    while reason := refused():
        assert reason == "untrusted"
    # The connection that was open goes on.
    assert hand_off(a, b, [0], [0], tokens=16).kv_tokens == 16
    port.close(0.0)
