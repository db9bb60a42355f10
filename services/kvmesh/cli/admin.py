"""What the commands for operators share: one call to a router's Admin service.

A router answers it to callers on loopback addresses only, and where operators have keys
to those only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kvmesh.cli.client import CONNECTION, DEFAULT_ENDPOINT, client_settings, connect, explain

_Answer = TypeVar("_Answer")

_TIMEOUT_S = 10.0


def call_admin(
    command: str, args: argparse.Namespace, call: Callable[[Any, dict[str, Any]], _Answer]
) -> _Answer | None:
    """Makes one call; None where it failed, which was then told.

    `call` gets the stub and the call's options.
    """
    import grpc

    from kvmesh.client.errors import error_from_rpc
    from kvmesh.v1 import admin_pb2_grpc as rpc

    values = client_settings(args, CONNECTION)
    with connect(values) as client:
        try:
            return call(rpc.AdminStub(client.channel), call_options(values))
        except grpc.RpcError as error:
            endpoint = values.get("endpoint") or DEFAULT_ENDPOINT
            text = explain(error_from_rpc(error), endpoint)
            print(f"kvmesh {command}: {text}", file=sys.stderr)
            return None


def call_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """How long a call may take, and whose it is."""
    from kvmesh.client.channel import call_metadata

    return {
        "timeout": values.get("timeout_s") or _TIMEOUT_S,
        "metadata": call_metadata(values.get("token"), None, None),
    }


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
