"""`kvmesh chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys

from kvmesh.cli.connect import add_connection_flags, told_plainly
from kvmesh.cli.generate import add_generation_flags, generation_options


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "chat", help="talk to a model", description=f"{__doc__} Ctrl-D ends it."
    )
    add_connection_flags(parser)
    add_generation_flags(parser)
    parser.add_argument("--system", help="system message")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Talks until the input ends. Ctrl-C ends an answer, or the conversation."""
    from kvmesh.cli.output import stream_answer, timings_line
    from kvmesh.client import Client

    messages: list[dict[str, str]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    with told_plainly(options.endpoint), Client(options.endpoint, token=options.token) as client:
        names = ", ".join(model.name for model in client.models(timeout=10)) or "none yet"
        print(f"models: {names}. Ctrl-D ends.", file=sys.stderr)
        while (text := _ask()) is not None:
            if not text.strip():
                continue
            messages.append({"role": "user", "content": text})
            try:
                events = client.generate(messages=messages, **generation_options(options))
                result = stream_answer(events)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": result.text})
            print(timings_line(result), file=sys.stderr)
    return 0


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print(file=sys.stderr)
        return None
