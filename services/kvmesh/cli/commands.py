"""Which commands there are, and the way from arguments to one of them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from kvmesh.cli.settings import UsageError

COMMANDS = {
    "up": "start a whole cluster on this machine",
    "router": "run a router",
    "worker": "run a worker",
    "attach": "make a server of its own, as of vLLM's, a worker",
    "chat": "talk with a model",
    "generate": "continue a prompt",
    "workers": "list the workers of a cluster",
    "drain": "let a worker finish what it has, and give it nothing new",
    "role": "change what a worker does, without a restart",
    "planner": "watch the pools: recommend changes of role, or make them",
    "explain": "say why a request went where it went",
    "simulate": "replay a trace over the scheduler, with simulated engines",
    "models": "list models, or get one",
    "key": "make an API key",
    "version": "print the version",
}
"""Each is a module of this package with `add_arguments(parser)` and `run(args)`."""

_EPILOG = """\
Begin with:
  kvmesh up                                      a cluster with a small chat model
  kvmesh chat                                    talk with it, in another terminal
  kvmesh generate "The capital of France is"     continue a text

Settings come from a file (--config or KVMESH_CONFIG), from KVMESH_* variables and
from flags; a later one of these wins. `kvmesh COMMAND --help` lists them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(_wanted(given))
    args = parser.parse_args(given)
    if args.command is None:
        parser.print_help()
        return 2
    module = importlib.import_module(f"kvmesh.cli.{args.command}")
    try:
        return int(module.run(args))
    except UsageError as error:
        print(f"kvmesh {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        sys.stderr.close()
        return 141
    except KeyboardInterrupt:
        return 130


def _wanted(given: Sequence[str]) -> str | None:
    return next((word for word in given if not word.startswith("-")), None)


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmesh",
        description="gRPC mesh for disaggregated LLM serving.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == wanted:
            importlib.import_module(f"kvmesh.cli.{name}").add_arguments(sub)
    return parser


def _version() -> str:
    import kvmesh

    return kvmesh.__version__
