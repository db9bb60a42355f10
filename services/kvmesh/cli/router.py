"""`kvmesh router`."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any, NoReturn, cast

from kvmesh.cli.announce import add_announce, announcer
from kvmesh.cli.settings import Setting, UsageError, add_settings, merged

_EPILOG = """\
examples:
  kvmesh router --etcd 127.0.0.1:2379               the workers of cluster "default" in etcd
  kvmesh router --workers 127.0.0.1:7001            one worker, no etcd
  kvmesh router --config kvmesh.toml                section [router]

SIGTERM ends it in order: health says NOT_SERVING, connections are told to go, what
runs has --grace to finish; a second one ends it at once. The program kvmesh-router is
the same without Python.
"""


OPERATORS = "operators are answered on "
"""What is announced before the router's own address, where operators have a port."""


class _Told(BaseException):
    """A signal told us to end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a router."""
    parser.epilog = _EPILOG
    add_settings(parser, settings())
    parser.add_argument(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="Python function that scores the plans of each request instead of --policy: NumPy "
        "columns in, a score a plan out, the least is chosen (docs/scheduling.md)",
    )
    add_announce(parser)


def run(args: argparse.Namespace) -> int:
    """Runs a router until it is told to stop."""
    from kvmesh._router import Router

    values = merged("router", settings(), args)
    scorer = _scorer(args.scorer) if args.scorer else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _told)
    announce = announcer(args.announce_fd)
    try:
        router = Router(json.dumps(values), scorer)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except _Told:
        return 0
    try:
        if router.admin_address:
            announce(f"{OPERATORS}{router.admin_address}")
        announce(f"listening on {router.address}")
        router.wait()
    except _Told:
        announce("draining")
    finally:
        router.close()
    announce("stopped")
    return 0


def _scorer(name: str) -> Callable[[dict[str, Any]], Any]:
    module, _, function = name.partition(":")
    # Like `python -m`: what lies in the working directory counts.
    sys.path.insert(0, "")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--scorer {name}: {error}; allowed: MODULE:FUNCTION") from error
    if not callable(scorer):
        raise UsageError(f"--scorer {name}: not a function")
    return cast("Callable[[dict[str, Any]], Any]", scorer)


def _told(number: int, _: FrameType | None) -> NoReturn:
    # The second one ends at once.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    raise _Told


@cache
def settings() -> tuple[Setting, ...]:
    """The router's settings, as its Rust code has them."""
    from kvmesh._router import router_settings

    return tuple(
        Setting(name, f"{meaning} Allowed: {allowed}.", is_switch=switch, default=default)
        for name, default, meaning, allowed, switch in router_settings()
    )
