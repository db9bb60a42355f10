"""A worker's registration, as Python has it, over a real etcd."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from kvmesh._router import (
    RegistryUnreachableError,
    WorkerIdTakenError,
    WorkerRegistration,
    list_routers,
    list_workers,
)
from kvmesh.cli.commands import main
from kvmesh.cli.etcd import free_ports
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.v1 import worker_pb2_grpc as rpc


def record(worker_id: str = "a", incarnation: int = 1, address: str = "127.0.0.1:1") -> bytes:
    made = wire.WorkerRecord(
        worker_id=worker_id,
        incarnation=incarnation,
        address=address,
        role=wire.ROLE_PREFILL,
        labels={"zone": "a"},
    )
    made.model.name = "sim"
    made.model.end_of_text_ids.extend([1, 2])
    return made.SerializeToString(deterministic=True)


def registered(etcd: str) -> dict[str, wire.WorkerRecord]:
    records = (wire.WorkerRecord.FromString(found) for found in list_workers([etcd], "test"))
    return {found.worker_id: found for found in records}


def test_a_record_comes_back_as_it_went_and_goes_when_closed(etcd):
    registration = WorkerRegistration([etcd], "test", record(), wait_s=30)
    assert registration.state() == "registered"
    assert registration.reason() == ""
    assert registered(etcd)["a"] == wire.WorkerRecord.FromString(record())
    assert list_workers([etcd], "other") == []
    assert list_routers([etcd], "test") == []

    registration.close()
    registration.close()
    assert registration.state() == "closed"
    assert registered(etcd) == {}


def test_what_cannot_be_registered_is_said(etcd):
    with pytest.raises(ValueError, match="not a serialised"):
        WorkerRegistration([etcd], "test", b"\xff\xff")
    with pytest.raises(ValueError, match="worker id"):
        WorkerRegistration([etcd], "test", record(worker_id="a/b"))
    with pytest.raises(ValueError, match="TTL"):
        WorkerRegistration([etcd], "test", record(), 0.5)
    with pytest.raises(ValueError, match="endpoints are empty"):
        WorkerRegistration([], "test", record())
    registration = WorkerRegistration([etcd], "test", record(), wait_s=30)
    with pytest.raises(ValueError, match="incarnation"):
        registration.update(record(incarnation=2))
    registration.close()


@contextmanager
def answering(incarnation: int) -> Iterator[str]:
    """A worker that answers GetInfo, and says which incarnation it is."""

    class Worker(rpc.WorkerServicer):
        def GetInfo(self, request, context):
            return wire.GetInfoResponse(record=wire.WorkerRecord(incarnation=incarnation))

    server = grpc.server(futures.ThreadPoolExecutor(1))
    rpc.add_WorkerServicer_to_server(Worker(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_live_worker_keeps_its_id_and_a_dead_one_does_not(etcd):
    with answering(1) as address:
        first = WorkerRegistration([etcd], "test", record(address=address), wait_s=30)
        with pytest.raises(WorkerIdTakenError, match=f"a is taken: {address}"):
            WorkerRegistration([etcd], "test", record(incarnation=2), wait_s=30)
    # The server is gone; its lease is not.
    second = WorkerRegistration([etcd], "test", record(incarnation=2), wait_s=30)
    assert registered(etcd)["a"].incarnation == 2
    second.close()
    first.close()


def test_another_process_at_the_address_is_not_that_worker(etcd):
    with answering(7) as address:
        first = WorkerRegistration([etcd], "test", record(address=address), wait_s=30)
        second = WorkerRegistration([etcd], "test", record(incarnation=2), wait_s=30)
        assert second.state() == "registered"
        second.close()
        first.close()


def test_a_worker_serves_without_etcd():
    (port,) = free_ports([0])
    nowhere = f"127.0.0.1:{port}"
    registration = WorkerRegistration([nowhere], "test", record(), wait_s=0)
    assert registration.wait_registered(0) is False
    registration.close()
    with pytest.raises(RegistryUnreachableError):
        list_workers([nowhere], "test")


def test_the_command_prints_a_table(etcd, capsys):
    registration = WorkerRegistration([etcd], "test", record(), wait_s=30)
    assert main(["workers", "--etcd", etcd, "--cluster", "test"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["WORKER", "ROLE", "MODEL"]
    assert row.split()[:3] == ["a", "prefill", "sim"]
    assert main(["workers", "--etcd", etcd, "--cluster", "test", "--json"]) == 0
    assert '"workerId": "a"' in capsys.readouterr().out
    registration.close()
