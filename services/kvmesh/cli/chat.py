"""`kvmesh chat`."""

from __future__ import annotations

import argparse
import sys

from kvmesh.cli.client import (
    CONNECTION,
    DEFAULT_ENDPOINT,
    SAMPLING,
    client_settings,
    connect,
    explain,
    print_stream,
    sampling_options,
    timings_line,
)
from kvmesh.cli.settings import add_settings

_EPILOG = """\
Type a message and Enter. Ctrl-C ends an answer, Ctrl-D the conversation.
  /new     begin a new conversation
  /help    show this
"""
_DEFAULT_MAX_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and how to answer."""
    parser.epilog = _EPILOG
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--timings", action="store_true", help="a line of timings after an answer")
    add_settings(parser, CONNECTION + SAMPLING)


def run(args: argparse.Namespace) -> int:
    """Asks and prints until the input ends."""
    import kvmesh

    values = client_settings(args, CONNECTION + SAMPLING)
    options = {"max_tokens": _DEFAULT_MAX_TOKENS, **sampling_options(values)}
    endpoint = values.get("endpoint") or DEFAULT_ENDPOINT
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    with connect(values) as client:
        while (line := _read_line()) is not None:
            if line in ("/new", "/help") or not line:
                if line == "/new":
                    messages = list(start)
                elif line == "/help":
                    print(_EPILOG, end="")
                continue
            messages.append({"role": "user", "content": line})
            try:
                events = client.generate(
                    messages=messages, timeout=values.get("timeout_s"), **options
                )
                answer, finished, _ = print_stream(events)
            except KeyboardInterrupt:
                print(" (ended)")
                messages.pop()
                continue
            except kvmesh.MeshError as error:
                print(f"kvmesh chat: {explain(error, endpoint)}", file=sys.stderr)
                if not sys.stdin.isatty():
                    return 1
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
            if args.timings and finished is not None:
                print(timings_line(finished), file=sys.stderr)
    return 0


def _read_line() -> str | None:
    """The next message; None at the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        # Gives the prompt line editing and a history.
        import readline  # noqa: F401
    while True:
        try:
            return input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
