"""`kvmesh version`."""

from __future__ import annotations

import argparse
import platform

import kvmesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Prints versions."""
    print(f"kvmesh {kvmesh.__version__} (Python {platform.python_version()})")
    return 0
