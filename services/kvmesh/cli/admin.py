"""`kvmesh workers`, `drain` and `role`: look at workers and move them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvmesh.cli.connect import add_connection_flags, told_plainly


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands."""
    workers = subparsers.add_parser(
        "workers", help="list the workers as a router sees them", description="Lists workers."
    )
    add_connection_flags(workers)
    workers.add_argument("--model", default="", help="only workers of this model")
    workers.add_argument("--json", action="store_true", help="print protobuf JSON")
    workers.set_defaults(run=run_workers)

    drain = subparsers.add_parser(
        "drain",
        help="let a worker finish what it has and take nothing new",
        description="Drains a worker. Refused where it would leave a role empty.",
    )
    add_connection_flags(drain)
    drain.add_argument("worker", help="its id, as kvmesh workers shows it")
    drain.add_argument("--grace", type=float, default=0.0, help="seconds [the worker's own]")
    drain.add_argument("--stop", action="store_true", help="end its process when nothing runs")
    drain.add_argument("--force", action="store_true", help="even if a role is left empty")
    drain.set_defaults(run=run_drain)

    role = subparsers.add_parser(
        "role",
        help="change a worker's role without a restart",
        description="Changes a worker's role. Refused where it would leave a role empty.",
    )
    add_connection_flags(role)
    role.add_argument("worker", help="its id, as kvmesh workers shows it")
    role.add_argument("role", choices=("prefill", "decode", "both"))
    role.add_argument("--force", action="store_true", help="even if a role is left empty")
    role.set_defaults(run=run_role)


def run_workers(options: argparse.Namespace) -> int:
    """Prints a table of workers."""
    from google.protobuf.json_format import MessageToJson

    from kvmesh.v1 import admin_pb2 as wire

    request = wire.ListWorkersRequest(model=options.model)
    answer = _call(options, lambda stub: stub.ListWorkers(request, timeout=10))
    if options.json:
        print(MessageToJson(answer, preserving_proto_field_name=True))
        return 0
    print(_table(answer.workers))
    return 0


def run_drain(options: argparse.Namespace) -> int:
    """Drains a worker."""
    from kvmesh.v1 import admin_pb2 as wire

    request = wire.DrainWorkerRequest(
        worker_id=options.worker,
        grace_ms=round(options.grace * 1000),
        force=options.force,
        stop=options.stop,
    )
    answer = _call(options, lambda stub: stub.DrainWorker(request, timeout=10))
    print(f"{options.worker} is draining, {answer.running} running")
    return 0


def run_role(options: argparse.Namespace) -> int:
    """Changes a role."""
    from kvmesh.v1 import admin_pb2 as wire
    from kvmesh.worker.settings import ROLES

    request = wire.SetWorkerRoleRequest(
        worker_id=options.worker, role=ROLES[options.role], force=options.force
    )
    _call(options, lambda stub: stub.SetWorkerRole(request, timeout=10))
    print(f"{options.worker} is now {options.role}")
    return 0


def _call(options: argparse.Namespace, call: Callable[[Any], Any]) -> Any:
    import grpc

    from kvmesh.client.errors import error_from_rpc
    from kvmesh.v1 import admin_pb2_grpc as rpc

    with told_plainly(options.endpoint), grpc.insecure_channel(options.endpoint) as channel:
        try:
            return call(rpc.AdminStub(channel))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def _table(workers: Iterable[Any]) -> str:
    from kvmesh.v1 import admin_pb2 as wire
    from kvmesh.v1 import worker_pb2

    rows = [
        ("WORKER", "ROLE", "MODEL", "ENGINE", "STATE", "ETCD", "QUEUED", "DECODING", "KV FREE",
         "INDEXED", "NOTE"),
    ]  # fmt: skip
    for worker in workers:
        record, load = worker.record, worker.load
        role = load.role or record.role
        pool = load.kv.free + load.kv.evictable + load.kv.running + load.kv.pinned
        pool += load.kv.reserved
        room = f"{100 * (load.kv.free + load.kv.evictable) / pool:.0f} %" if pool else "-"
        notes = [worker.state_detail, worker.index_detail, "draining" if load.draining else ""]
        rows.append(
            (
                record.worker_id,
                worker_pb2.Role.Name(role).removeprefix("ROLE_").lower(),
                record.model.name,
                record.capabilities.engine,
                wire.SessionState.Name(worker.state).removeprefix("SESSION_STATE_").lower(),
                "yes" if worker.registered else "no",
                str(load.own.queued + load.others.queued),
                str(load.own.decoding + load.others.decoding),
                room,
                str(worker.indexed_blocks),
                "; ".join(note for note in notes if note),
            )
        )
    return _align(rows)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
