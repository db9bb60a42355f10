"""`kvmesh drain`."""

from __future__ import annotations

import argparse

from kvmesh.cli.admin import call_admin
from kvmesh.cli.client import CONNECTION
from kvmesh.cli.settings import UsageError, add_settings
from kvmesh.setting_values import ValueNotAllowedError, duration_s

_EPILOG = """\
The worker takes nothing new and finishes what it has. What still runs when the grace
ends goes back to its router, which places it anew; the worker's log says which. Refused
where that would leave a role empty, unless --force is given.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which worker, and how long."""
    parser.epilog = _EPILOG
    parser.add_argument("worker", metavar="WORKER", help="its id, as `kvmesh workers` shows it")
    parser.add_argument(
        "--grace",
        default="0s",
        metavar="TIME",
        help="time for running work, such as 30s or 500ms; 0: the worker's own grace",
    )
    parser.add_argument("--stop", action="store_true", help="end its process when nothing runs")
    parser.add_argument("--force", action="store_true", help="even if a role is left empty")
    add_settings(parser, CONNECTION)


def run(args: argparse.Namespace) -> int:
    """Drains a worker."""
    from kvmesh.v1 import admin_pb2 as admin

    try:
        grace_s = duration_s("--grace", args.grace)
    except ValueNotAllowedError as error:
        raise UsageError(str(error)) from error
    request = admin.DrainWorkerRequest(
        worker_id=args.worker,
        grace_ms=round(grace_s * 1000),
        force=args.force,
        stop=args.stop,
    )
    answer = call_admin("drain", args, lambda stub, how: stub.DrainWorker(request, **how))
    if answer is None:
        return 1
    print(f"{args.worker} is draining, {answer.running} running")
    for stream in answer.staying:
        print(f"{stream.generation_id} stays: {stream.reason}")
    return 0
