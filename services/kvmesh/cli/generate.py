"""`kvmesh generate`: one answer."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from kvmesh.cli.connect import add_connection_flags, told_plainly
from kvmesh.cli.errors import CommandError

_EXAMPLES = """\
examples:
  kvmesh generate "The capital of France is" --max-tokens 8 --temperature 0
  kvmesh generate --chat "What is the capital of France?"
  kvmesh generate --token-ids 504,3575,282 --json
  cat prompt.txt | kvmesh generate -
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "generate",
        help="ask for one answer",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_connection_flags(parser)
    add_generation_flags(parser)
    parser.add_argument("prompt", nargs="?", help="the text to continue; - reads standard input")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message, not raw text"
    )
    parser.add_argument("--system", help="system message; needs --chat")
    parser.add_argument("--token-ids", help="token ids instead of text, with commas")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one object: token_ids, text, finish_reason, usage, timings",
    )
    parser.set_defaults(run=run)


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `chat` takes as well."""
    parser.add_argument("--model", help="the model; not needed where there is one")
    parser.add_argument("--max-tokens", type=int, help="most tokens to output")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", help="a text that ends the answer; repeatable")
    parser.add_argument(
        "--class", dest="request_class", choices=("interactive", "standard", "batch")
    )
    parser.add_argument("--timeout", type=float, help="seconds")


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as arguments of `Client.generate`."""
    names = (
        "model", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop",
        "request_class", "timeout",
    )  # fmt: skip
    return {n: v for n in names if (v := getattr(options, n, None)) is not None}


def run(options: argparse.Namespace) -> int:
    """Asks once and prints."""
    from kvmesh.cli.output import stream_answer, timings_line
    from kvmesh.client import Client

    arguments = {**generation_options(options), **_input(options)}
    with told_plainly(options.endpoint), Client(options.endpoint, token=options.token) as client:
        if options.json:
            print(json.dumps(client.complete(**arguments).to_dict()))
            return 0
        result = stream_answer(client.generate(**arguments))
    print(timings_line(result), file=sys.stderr)
    return 0


def _input(options: argparse.Namespace) -> dict[str, Any]:
    if (options.prompt is None) == (options.token_ids is None):
        raise CommandError("give a prompt or --token-ids, and not both", status=2)
    if options.system and not options.chat:
        raise CommandError("--system needs --chat", status=2)
    if options.token_ids is not None:
        try:
            return {"token_ids": [int(part) for part in options.token_ids.split(",")]}
        except ValueError as error:
            raise CommandError(
                f"--token-ids is {options.token_ids!r}; allowed are numbers with commas", status=2
            ) from error
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not options.chat:
        return {"prompt": text}
    system = [{"role": "system", "content": options.system}] if options.system else []
    return {"messages": [*system, {"role": "user", "content": text}]}
