"""`kvmesh generate`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

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
from kvmesh.cli.settings import UsageError, add_settings

_EPILOG = """\
examples:
  kvmesh generate "The capital of France is" --max-tokens 8 --temperature 0
  kvmesh generate --chat "What is the capital of France?"
  kvmesh generate --token-ids 504,3575,282 --json
  cat notes.txt | kvmesh generate - --max-tokens 64

With --json one object is printed: token_ids, text, finish_reason, usage, timings
and more. Exit status 1: the mesh refused or failed, and said why on standard error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, and how to continue it."""
    parser.epilog = _EPILOG
    parser.add_argument("prompt", nargs="?", help="text to continue; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a chat message")
    parser.add_argument("--system", metavar="TEXT", help="system message; only with --chat")
    parser.add_argument("--token-ids", metavar="ID,ID…", help="token ids instead of a prompt")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--ignore-end-of-text", action="store_true", help="do not end by itself")
    parser.add_argument(
        "--trace", action="store_true", help="also say what it waited for, span by span"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_settings(parser, CONNECTION + SAMPLING)


def run(args: argparse.Namespace) -> int:
    """Generates once."""
    import kvmesh

    values = client_settings(args, CONNECTION + SAMPLING)
    options = {**sampling_options(values), **_input(args)}
    if args.stop:
        options["stop"] = args.stop
    if args.ignore_end_of_text:
        options["ignore_end_of_text"] = True
    if args.trace:
        options["trace"] = True
    timeout = values.get("timeout_s")
    with connect(values) as client:
        try:
            if args.json:
                result = client.complete(timeout=timeout, **options)
                print(json.dumps(result.to_dict()))
                return 0
            _, finished, _ = print_stream(client.generate(timeout=timeout, **options))
        except kvmesh.MeshError as error:
            endpoint = values.get("endpoint") or DEFAULT_ENDPOINT
            print(f"kvmesh generate: {explain(error, endpoint)}", file=sys.stderr)
            return 1
    if finished is not None and sys.stderr.isatty():
        print(timings_line(finished), file=sys.stderr)
    for span in finished.trace if finished is not None else ():
        what = f"{span.name} {span.tokens or ''} {span.cause}".strip()
        print(f"{span.start_ms:10.1f} ms {span.duration_ms:10.1f} ms  {what}", file=sys.stderr)
    return 0


def _input(args: argparse.Namespace) -> dict[str, Any]:
    if (args.prompt is None) == (args.token_ids is None):
        raise UsageError("one of PROMPT and --token-ids is needed")
    if args.token_ids is not None:
        try:
            return {"token_ids": [int(part) for part in args.token_ids.split(",") if part.strip()]}
        except ValueError as error:
            text = f"--token-ids is {args.token_ids!r}; allowed are numbers with commas between"
            raise UsageError(text) from error
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not args.chat:
        if args.system:
            raise UsageError("--system needs --chat")
        return {"prompt": prompt}
    messages = [{"role": "user", "content": prompt}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    return {"messages": messages}
