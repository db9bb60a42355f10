"""The cluster's token between real routers and workers: who has it not gets nothing."""

import time

import grpc
import pytest

import kvmesh
from kvmesh.cli import main
from kvmesh.v1 import worker_pb2, worker_pb2_grpc

OWN, NEW, GUESSED = ("own-token-" * 4, "new-token-" * 4, "guessed-token-" * 3)


def token_file(tmp_path, name: str, *tokens: str) -> tuple[str, str]:
    file = tmp_path / name
    file.write_text("".join(f"{token}\n" for token in tokens))
    return "--cluster-token-file", str(file)


def shown(token: str) -> tuple[tuple[str, str], ...]:
    return (("kvmesh-cluster-token", token),) if token else ()


def calls(stub: worker_pb2_grpc.WorkerStub):
    """Every call of a worker, each as something to do with metadata."""
    hello = worker_pb2.RouterFrame(hello=worker_pb2.RouterHello(router_id="stranger"))
    return {
        "Attach": lambda m: next(stub.Attach(iter([hello]), metadata=m, timeout=10)),
        "GetInfo": lambda m: stub.GetInfo(worker_pb2.GetInfoRequest(), metadata=m, timeout=10),
        "GetTokenizer": lambda m: next(
            stub.GetTokenizer(worker_pb2.GetTokenizerRequest(), metadata=m, timeout=10)
        ),
        "Drain": lambda m: stub.Drain(worker_pb2.DrainRequest(stop=True), metadata=m, timeout=10),
        "SetRole": lambda m: stub.SetRole(
            worker_pb2.SetRoleRequest(role=worker_pb2.ROLE_BOTH), metadata=m, timeout=10
        ),
    }


def text(endpoint: str) -> list[int]:
    with kvmesh.Client(endpoint) as client:
        return client.complete(prompt="Of one cluster", max_tokens=24, temperature=0).token_ids


def test_a_stranger_gets_nothing_of_a_worker_and_its_own_routers_feel_nothing(
    fresh, tmp_path
) -> None:
    own = token_file(tmp_path, "own", OWN)
    endpoint = fresh.start_router(*own)
    # KV goes over TCP, and its hello shows the token as well.
    fresh.start_worker("p", "prefill", *own, "--transfer-tcp")
    fresh.start_worker("d", "decode", *own, "--transfer-tcp")
    fresh.wait_live(endpoint, "p", "d")
    assert len(text(endpoint)) == 24
    stub = worker_pb2_grpc.WorkerStub(fresh.channel(fresh.worker_address("d")))
    for name, call in calls(stub).items():
        for token in ("", GUESSED, OWN[:-1], OWN + "x"):
            with pytest.raises(grpc.RpcError) as refused:
                call(shown(token))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
            said = refused.value.details()
            assert "cluster_token_file" in said
            assert not token or token not in said
            # Nothing of the cluster.
            assert "sim" not in said
    # A probe of an orchestrator has no token.
    assert fresh.healthy("d")
    for stranger in ((), token_file(tmp_path, "guessed", GUESSED)):
        other = fresh.start_router(*stranger)
        table = fresh.wait_table(
            other,
            lambda table: (
                {"p", "d"} <= set(table)
                and all("cluster's token" in table[name].state_detail for name in ("p", "d"))
            ),
        )
        assert not any(worker.HasField("load") for worker in table.values())
    assert len(text(endpoint)) == 24
    info = calls(stub)["GetInfo"](shown(OWN))
    assert info.record.role == worker_pb2.ROLE_DECODE
    assert not info.load.draining
    for child in (*fresh.routers.values(), *fresh.workers.values()):
        log = child.log.read_text()
        for token in (OWN, GUESSED):
            assert token not in log


def test_workers_that_do_not_trust_each_other_exchange_no_kv(fresh, tmp_path) -> None:
    """The router is known to both: the first token comes from prefill, and no KV moves."""
    endpoint = fresh.start_router(*token_file(tmp_path, "both", OWN))
    fresh.start_worker("p", "prefill", *token_file(tmp_path, "p", NEW, OWN))
    fresh.start_worker("d", "decode", *token_file(tmp_path, "d", GUESSED, OWN))
    fresh.wait_live(endpoint, "p", "d")
    with (
        kvmesh.Client(endpoint, recover_s=0) as client,
        pytest.raises(kvmesh.MeshUnavailableError, match="too many attempts failed"),
    ):
        client.complete(prompt="Not from there", max_tokens=100, temperature=0)
    assert "transfer_failed" in fresh.workers["d"].log.read_text()


def test_a_token_is_changed_while_all_of_them_run(fresh, tmp_path) -> None:
    file = token_file(tmp_path, "own", OWN)
    endpoint = fresh.start_router(*file)
    fresh.start_worker("a", "both", *file)
    fresh.wait_live(endpoint, "a")
    stub = worker_pb2_grpc.WorkerStub(fresh.channel(fresh.worker_address("a")))
    info = calls(stub)["GetInfo"]

    def known(token: str) -> bool:
        try:
            info(shown(token))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            return False
        return True

    def wait_known(token: str, wanted: bool) -> None:
        deadline = time.monotonic() + 60
        while known(token) is not wanted:
            assert time.monotonic() < deadline, f"the changed file was never taken ({wanted=})"
            fresh.children.wait(0.02)

    for tokens in ((OWN, NEW), (NEW, OWN), (NEW,)):
        token_file(tmp_path, "own", *tokens)
        wait_known(NEW, True)
        assert len(text(endpoint)) == 24
    wait_known(OWN, False)
    # A file that cannot be used changes nothing.
    token_file(tmp_path, "own", "short")
    log = fresh.workers["a"].log
    while "files_not_changed" not in log.read_text():
        fresh.children.wait(0.02)
    info(shown(NEW))
    assert "short" not in log.read_text()
    fresh.assert_alive()


@pytest.mark.parametrize("wrong", ["", "too short", None])
def test_what_is_no_token_is_told_at_the_start(wrong, tmp_path, capsys) -> None:
    file = tmp_path / "token"
    if wrong is not None:
        file.write_text(wrong)
    for command in (["worker", "--engine", "sim"], ["router", "--listen", "127.0.0.1:0"]):
        assert main([*command, "--cluster-token-file", str(file)]) == 2
        said = capsys.readouterr().err
        assert "cluster_token_file" in said
        assert str(file) in said
        assert not wrong or wrong not in said


def test_other_machines_are_let_in_with_a_token_only(capsys) -> None:
    for setting in ("--listen", "--transfer-listen"):
        assert main(["worker", "--engine", "sim", setting, "0.0.0.0:0"]) == 2
        said = capsys.readouterr().err
        for named in (setting[2:].replace("-", "_"), "cluster_token_file", "insecure"):
            assert named in said
