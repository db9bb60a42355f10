"""`kvmesh role`."""

from __future__ import annotations

import argparse

from kvmesh.cli.admin import call_admin
from kvmesh.cli.client import CONNECTION
from kvmesh.cli.settings import add_settings
from kvmesh.roles import ROLES, role_name, role_number

_EPILOG = """\
New work follows the new role. Prompts that are being computed go on where they are. A worker
that becomes prefill hands its streams to others, with their KV; those for which nobody has
room stay until they are done. Refused where a role would be left empty, unless --force is
given.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which worker, and what it becomes."""
    parser.epilog = _EPILOG
    parser.add_argument("worker", metavar="WORKER", help="its id, as `kvmesh workers` shows it")
    parser.add_argument("role", choices=ROLES, help="the new role")
    parser.add_argument("--force", action="store_true", help="even if a role is left empty")
    add_settings(parser, CONNECTION)


def run(args: argparse.Namespace) -> int:
    """Changes a worker's role."""
    from kvmesh.v1 import admin_pb2 as admin

    request = admin.SetWorkerRoleRequest(
        worker_id=args.worker, role=role_number(args.role), force=args.force
    )
    answer = call_admin("role", args, lambda stub, how: stub.SetWorkerRole(request, **how))
    if answer is None:
        return 1
    print(f"{args.worker} is now {role_name(answer.role)}")
    return 0
