"""TLS between routers and workers: each is known by what its certificate says of it."""

import socket

import grpc
import pytest
from authority import Authority, Issued
from figures import figures
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvmesh
from kvmesh._router import WorkerRegistration
from kvmesh.cli import main
from kvmesh.v1 import worker_pb2, worker_pb2_grpc

NAME = "worker.test"
"""Name in workers' certificates for clients that know workers by one; routers do not."""


def uri(role: str, name: str, cluster: str = "default") -> str:
    return f"URI:kvmesh://{cluster}/{role}/{name}"


class Secured:
    """A cluster's certificates, and its parts with them."""

    def __init__(self, cluster, folder) -> None:
        self.cluster = cluster
        self.authority = Authority(folder / "certificates")

    def worker(self, name: str, role: str, *arguments: str) -> Issued:
        issued = self.authority.issue(name, uri("worker", name), f"DNS:{NAME}")
        self.cluster.start_worker(name, role, *self.worker_files(issued), *arguments)
        return issued

    def worker_files(self, issued: Issued) -> tuple[str, ...]:
        return (
            "--tls-cert", str(issued.certificate), "--tls-key", str(issued.key),
            "--tls-ca", str(self.authority.ca),
        )  # fmt: skip

    def router(self, *arguments: str) -> str:
        return str(self.cluster.start_router(*self.router_files(), *arguments))

    def router_files(self) -> tuple[str, ...]:
        issued = self.authority.issue("r", uri("router", "r"))
        return (
            "--worker-ca", str(self.authority.ca),
            "--worker-cert", str(issued.certificate), "--worker-key", str(issued.key),
        )  # fmt: skip

    def channel(self, name: str, shows: Issued | None = None) -> grpc.Channel:
        """To a worker, as somebody who trusts the authority."""
        credentials = grpc.ssl_channel_credentials(
            self.authority.ca.read_bytes(),
            shows.key.read_bytes() if shows else None,
            shows.certificate.read_bytes() if shows else None,
        )
        return grpc.secure_channel(
            self.cluster.worker_address(name),
            credentials,
            (("grpc.ssl_target_name_override", NAME),),
        )


@pytest.fixture
def secured(fresh, tmp_path) -> Secured:
    return Secured(fresh, tmp_path)


def refusal(channel: grpc.Channel, call: str) -> grpc.StatusCode | None:
    """What a call to a worker is refused with; None: it was answered."""
    stub = worker_pb2_grpc.WorkerStub(channel)
    hello = worker_pb2.RouterFrame(
        hello=worker_pb2.RouterHello(version={"major": 1}, router_id="somebody")
    )
    calls = {
        "Attach": lambda: next(stub.Attach(iter([hello]), timeout=10)),
        "GetInfo": lambda: stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=10),
        "GetTokenizer": lambda: next(
            stub.GetTokenizer(worker_pb2.GetTokenizerRequest(), timeout=10)
        ),
        "Drain": lambda: stub.Drain(worker_pb2.DrainRequest(), timeout=10),
        "SetRole": lambda: stub.SetRole(
            worker_pb2.SetRoleRequest(role=worker_pb2.ROLE_BOTH), timeout=10
        ),
    }
    try:
        calls[call]()
    except grpc.RpcError as error:
        return error.code()
    return None


def serving(channel: grpc.Channel) -> bool:
    """Whether health says so; False: it cannot be reached."""
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


ROUTERS = ("Attach", "SetRole", "Drain")
ANYBODYS = ("GetInfo", "GetTokenizer")


def test_each_call_is_for_those_whose_certificate_says_so(secured, tmp_path) -> None:
    endpoint = secured.router()
    secured.worker("p", "prefill")
    secured.worker("d", "decode")
    secured.cluster.wait_live(endpoint, "p", "d")
    with kvmesh.Client(endpoint) as client:
        assert len(client.complete(prompt="Over TLS", max_tokens=24).token_ids) == 24

    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    denied, unreachable = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE
    issue = secured.authority.issue
    others = {
        "nobody": (None, unauthenticated, unauthenticated),
        "named by none": (issue("n", "DNS:n.test"), unauthenticated, unauthenticated),
        "another cluster's": (issue("o", uri("router", "o", "other")),) + (unauthenticated,) * 2,
        "of two": (issue("t", uri("router", "t"), uri("admin", "t")),) + (unauthenticated,) * 2,
        "a worker": (issue("w", uri("worker", "w")), denied, None),
        "another authority's": (
            Authority(tmp_path / "other").issue("r", uri("router", "r")), unreachable, unreachable
        ),
    }  # fmt: skip
    for who, (shows, of_routers, of_anybody) in others.items():
        with secured.channel("d", shows) as channel:
            for call in ROUTERS:
                assert refusal(channel, call) is of_routers, (who, call)
            for call in ANYBODYS:
                assert refusal(channel, call) is of_anybody, (who, call)
    with grpc.insecure_channel(secured.cluster.worker_address("d")) as plain:
        assert refusal(plain, "GetInfo") is unreachable
    # A probe of an orchestrator has no certificate.
    with secured.channel("d") as channel:
        assert serving(channel)
    # The worker is as it was: none of these reached it.
    assert secured.cluster.table(endpoint)["d"].load.role == worker_pb2.ROLE_DECODE
    assert not secured.cluster.table(endpoint)["d"].load.draining
    with secured.channel("d", issue("a", uri("admin", "ann"))) as channel:
        for call in ("SetRole", *ANYBODYS):
            assert refusal(channel, call) is None, call
    secured.cluster.wait_table(endpoint, lambda table: table["d"].load.role == worker_pb2.ROLE_BOTH)
    assert main(["drain", "d", "--endpoint", endpoint, "--force"]) == 0


def test_kv_goes_over_tls_between_workers(secured) -> None:
    endpoint = secured.router()
    secured.worker("p", "prefill", "--transfer-tcp")
    secured.worker("d", "decode", "--transfer-tcp")
    secured.cluster.wait_live(endpoint, "p", "d")
    with kvmesh.Client(endpoint) as client:
        done = client.complete(prompt="A longer one, over TLS " * 40, max_tokens=24)
    assert len(done.token_ids) == 24
    assert done.usage.attempts == 1
    counted = figures(endpoint)
    assert counted["transferred_bytes_total"] > 0
    assert counted["transfers_failed_total"] == 0
    # Who speaks no TLS there is told so, and closed.
    address = secured.cluster.table(endpoint)["p"].record.transfer_address
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(b"\x04\x00\x00\x00" + bytes(4))
        assert b"tls_cert, tls_key and tls_ca" in b"".join(iter(lambda: plain.recv(1024), b""))


def test_a_router_attaches_to_no_other_worker_than_the_record_names(secured) -> None:
    endpoint = secured.router()
    issued = secured.worker("d", "both")
    secured.cluster.wait_live(endpoint, "d")
    # Somebody who may write to etcd says that another worker is where this one is.
    record = secured.cluster.table(endpoint)["d"].record
    record.worker_id, record.incarnation = "ghost", record.incarnation + 1
    ghost = WorkerRegistration([secured.cluster.etcd], "default", record.SerializeToString())
    try:
        table = secured.cluster.wait_table(
            endpoint, lambda table: "ghost" in table and table["ghost"].state_detail
        )
        assert "it is of worker d, worker ghost was to be there" in table["ghost"].state_detail
    finally:
        ghost.close()
    # By its address alone it is known by what it says, and that has to be one.
    stranger = secured.router("--workers", secured.cluster.worker_address("d"))
    secured.cluster.wait_live(stranger, "d")
    # Nor is its id taken from one that lives: it is asked over TLS as well.
    twin = secured.cluster.begin_worker(
        "twin", "both", *secured.worker_files(issued), "--worker-id", "d"
    )
    assert twin.process.wait(60) == 2
    assert "d is taken" in twin.log.read_text()
    # One that speaks no TLS cannot ask it, and takes it no more than that.
    plain = secured.cluster.begin_worker("plain", "both", "--worker-id", "d")
    assert plain.process.wait(60) == 2
    assert "d is taken" in plain.log.read_text()
    # A worker does not begin with somebody else's certificate.
    child = secured.cluster.begin_worker("e", "both", *secured.worker_files(issued))
    assert child.process.wait(60) == 2
    said = child.log.read_text()
    assert "tls_cert" in said
    assert "it is of worker d; allowed is that of worker e" in said


def test_routers_and_workers_without_tls_are_not_spoken_to(secured) -> None:
    secured.worker("d", "both")
    plain = secured.cluster.start_router()
    detail = secured.cluster.wait_table(
        plain, lambda table: "d" in table and table["d"].state_detail
    )["d"].state_detail
    assert detail
    secured.cluster.start_worker("plain", "both")
    endpoint = secured.router()
    secured.cluster.wait_live(endpoint, "d")
    table = secured.cluster.wait_table(
        endpoint, lambda table: "plain" in table and table["plain"].state_detail
    )
    assert not table["plain"].HasField("load")


def test_certificates_are_changed_while_a_stream_runs(secured, tmp_path) -> None:
    endpoint = secured.router()
    issued = secured.worker("d", "both")
    secured.cluster.wait_live(endpoint, "d")
    log = secured.cluster.workers["d"].log
    with kvmesh.Client(endpoint) as client:
        stream = client.generate(prompt="On and on", max_tokens=3_000, ignore_end_of_text=True)
        next(stream)
        # Another authority is trusted besides, and then the only one that workers show.
        new = Authority(tmp_path / "new")
        old_ca = secured.authority.ca.read_bytes()
        secured.authority.ca.write_bytes(old_ca + new.ca.read_bytes())
        renewed = new.issue("d", uri("worker", "d"), f"DNS:{NAME}")
        issued.certificate.write_bytes(renewed.certificate.read_bytes())
        issued.key.write_bytes(renewed.key.read_bytes())
        secured.authority.ca = new.ca

        def shown() -> bool:
            with secured.channel("d") as channel:
                return serving(channel)

        while not shown():
            secured.cluster.children.wait(0.05)
        # Something that is no certificate changes nothing.
        issued.certificate.write_text("not a certificate")
        while "files_not_changed" not in log.read_text():
            secured.cluster.children.wait(0.05)
        with secured.channel("d") as channel:
            assert refusal(channel, "GetInfo") is grpc.StatusCode.UNAUTHENTICATED
        *_, last = stream
        assert last.usage.output_tokens == 3_000
        assert last.usage.attempts == 1


@pytest.mark.parametrize("left_out", ["tls-cert", "tls-key", "tls-ca"])
def test_a_workers_files_go_together(left_out, capsys) -> None:
    files = [
        part
        for name in ("tls-cert", "tls-key", "tls-ca")
        if name != left_out
        for part in (f"--{name}", "x.pem")
    ]
    assert main(["worker", "--engine", "sim", *files]) == 2
    said = capsys.readouterr().err
    for name in ("tls_cert", "tls_key", "tls_ca"):
        assert name in said
