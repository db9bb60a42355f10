"""Flags and errors that all client commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvmesh.cli.errors import CommandError

DEFAULT_ENDPOINT = "127.0.0.1:8000"


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --endpoint and --token."""
    parser.add_argument(
        "--endpoint",
        default=os.environ.get("KVMESH_ENDPOINT", DEFAULT_ENDPOINT),
        metavar="HOST:PORT",
        help=f"the router [{DEFAULT_ENDPOINT}] (KVMESH_ENDPOINT)",
    )
    parser.add_argument(
        "--token", default=os.environ.get("KVMESH_TOKEN"), help="API key or JWT (KVMESH_TOKEN)"
    )


@contextmanager
def told_plainly(endpoint: str) -> Iterator[None]:
    """Turns what a call raises into one plain message."""
    from kvmesh.client import MeshError, MeshUnavailableError

    try:
        yield
    except MeshUnavailableError as error:
        hint = "" if error.reason else f"\n  is a router running at {endpoint}? (kvmesh up)"
        raise CommandError(f"{error}{hint}") from error
    except MeshError as error:
        raise CommandError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), status=2) from error
