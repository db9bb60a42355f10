"""`kvmesh workers`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvmesh.cli.settings import Setting, UsageError, add_settings, endpoints, merged

DEFAULT_ETCD = "127.0.0.1:2379"

REGISTRY = (
    Setting("etcd", "etcd endpoints, host:port, with commas between", default=DEFAULT_ETCD),
    Setting("cluster", "name of the cluster", default="default"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where etcd is."""
    parser.epilog = "Lists who is registered in etcd; routers know who works."
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    add_settings(parser, REGISTRY)


def run(args: argparse.Namespace) -> int:
    """Prints a table of the workers."""
    from google.protobuf.json_format import MessageToDict

    from kvmesh._router import RegistryUnreachableError, list_workers
    from kvmesh.v1 import worker_pb2 as wire

    values = merged("client", REGISTRY, args)
    where = endpoints(values.get("etcd") or DEFAULT_ETCD)
    try:
        found = list_workers(where, values.get("cluster") or "default")
    except RegistryUnreachableError as error:
        raise UsageError(f"etcd is {','.join(where)}: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    records = [wire.WorkerRecord.FromString(record) for record in found]
    if args.json:
        print(json.dumps([MessageToDict(record) for record in records], indent=1))
        return 0
    head = ("WORKER", "ROLE", "MODEL", "ENGINE", "ADDRESS", "TRANSFER", "VERSION")
    rows = [head, *(_row(record, wire) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


def _row(record: Any, wire: Any) -> tuple[str, ...]:
    role = wire.Role.Name(record.role).removeprefix("ROLE_").lower()
    return (
        record.worker_id,
        role,
        record.model.name,
        record.capabilities.engine,
        record.address,
        record.transfer_address or "-",
        record.version,
    )
