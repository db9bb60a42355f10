"""`kvmesh router`."""

from __future__ import annotations

import argparse

from kvmesh.cli.announce import add_announce
from kvmesh.cli.settings import Setting, UsageError, add_settings

SETTINGS: tuple[Setting, ...] = (
    Setting("listen", "address of the port", metavar="HOST:PORT", default="127.0.0.1:8000"),
    Setting("etcd", "etcd endpoints, host:port, with commas between"),
    Setting("cluster", "name of the cluster", default="default"),
    Setting("insecure", "allow plain text on an address that is not loopback", is_switch=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a router."""
    add_settings(parser, SETTINGS)
    add_announce(parser)


def run(args: argparse.Namespace) -> int:
    """Runs a router until it is told to stop."""
    raise UsageError("not built yet")
