"""`kvmesh workers`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from kvmesh.cli.admin import call_admin, print_table
from kvmesh.cli.client import CONNECTION
from kvmesh.cli.settings import Setting, UsageError, add_settings, endpoints, merged
from kvmesh.etcd_access import EtcdAccess
from kvmesh.roles import role_name

if TYPE_CHECKING:
    from kvmesh.v1 import admin_pb2
    from kvmesh.v1 import worker_pb2 as wire

ETCD_ACCESS = (
    Setting("etcd_ca", "speak TLS to etcd, trusting the roots in this PEM file", metavar="FILE"),
    Setting("etcd_cert", "PEM file of our certificate for etcd", metavar="FILE"),
    Setting("etcd_key", "PEM file of that certificate's key", metavar="FILE"),
    Setting("etcd_server_name", "name in etcd's certificate, where its address is another"),
    Setting("etcd_user", "user at etcd"),
    Setting("etcd_password", "password at etcd; best given by its variable"),
)

REGISTRY = (
    Setting("etcd", "ask etcd at host:port,… who is registered, not a router who works",
            flag_only=True),
    Setting("cluster", "name of the cluster; with --etcd", default="default"),
    *ETCD_ACCESS,
)  # fmt: skip

_EPILOG = """\
STATE is the router's session with the worker; ETCD whether it is registered now. A
worker that is not registered serves on while its session lives.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom to ask."""
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, CONNECTION + REGISTRY)


def run(args: argparse.Namespace) -> int:
    """Prints a table of the workers."""
    return _registered(args) if args.etcd else _served(args)


def _served(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToJson

    from kvmesh.v1 import admin_pb2 as admin

    request = admin.ListWorkersRequest()
    answer = call_admin("workers", args, lambda stub, how: stub.ListWorkers(request, **how))
    if answer is None:
        return 1
    if args.json:
        print(MessageToJson(answer, preserving_proto_field_name=True))
        return 0
    head = ("WORKER", "ROLE", "MODEL", "ENGINE", "STATE", "ETCD", "QUEUED", "DECODING",
            "KV FREE", "INDEXED", "NOTE")  # fmt: skip
    print_table([head, *map(_state_row, answer.workers)])
    return 0


def _state_row(worker: admin_pb2.WorkerStatus) -> tuple[str, ...]:
    from kvmesh.v1 import admin_pb2 as admin

    record, load, kv = worker.record, worker.load, worker.load.kv
    pool = kv.free + kv.evictable + kv.running + kv.pinned + kv.reserved
    notes = (worker.state_detail, worker.index_detail, "draining" if load.draining else "")
    return (
        record.worker_id,
        role_name(load.role or record.role),
        record.model.name,
        record.capabilities.engine,
        admin.SessionState.Name(worker.state).removeprefix("SESSION_STATE_").lower(),
        "yes" if worker.registered else "no",
        str(load.own.queued + load.others.queued),
        str(load.own.decoding + load.others.decoding),
        f"{100 * (kv.free + kv.evictable) / pool:.0f} %" if pool else "-",
        str(worker.indexed_blocks),
        "; ".join(note for note in notes if note),
    )


def _registered(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToDict

    from kvmesh._router import RegistryUnreachableError, list_workers
    from kvmesh.v1 import worker_pb2 as wire

    values = merged("client", REGISTRY, args)
    where = endpoints(values["etcd"])
    try:
        access_names = [setting.name for setting in ETCD_ACCESS]
        access = EtcdAccess(**{name: str(values.get(name, "")) for name in access_names})
        found = list_workers(where, values.get("cluster") or "default", **access.arguments())
    except RegistryUnreachableError as error:
        raise UsageError(f"etcd is {','.join(where)}: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    records = [wire.WorkerRecord.FromString(record) for record in found]
    if args.json:
        print(json.dumps([MessageToDict(record) for record in records], indent=1))
        return 0
    head = ("WORKER", "ROLE", "MODEL", "ENGINE", "ADDRESS", "TRANSFER", "VERSION")
    print_table([head, *map(_record_row, records)])
    return 0


def _record_row(record: wire.WorkerRecord) -> tuple[str, ...]:
    return (
        record.worker_id,
        role_name(record.role),
        record.model.name,
        record.capabilities.engine,
        record.address,
        record.transfer_address or "-",
        record.version,
    )
