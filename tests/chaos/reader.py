"""A client in a process of its own that never gives a stream up: it reads, and waits for ever.

    python tests/chaos/reader.py ADDRESS TOKENS --announce-fd FD

It speaks HTTP/2 by hand: a gRPC library would look after its connection by itself. It answers
pings, and says on the pipe when its stream runs and when that has ended.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

from many_streams import prompts
from raw_http2 import RawHttp2, message

from kvmesh.v1 import inference_pb2

RUNS, ENDED = "the stream runs", "the stream has ended"
FIRST = 10
"""Tokens after which it runs."""
SEED = 2
"""Of its prompt: another one than those of the streams beside it."""


def main() -> None:
    """Asks for one stream."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="of the router")
    parser.add_argument("tokens", type=int, help="length of the output")
    parser.add_argument(
        "--announce-fd", type=int, required=True, help="where it says how far it is"
    )
    options = parser.parse_args()
    (prompt,) = prompts(1, seed=SEED)
    body = message(
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            stopping=inference_pb2.Stopping(max_tokens=options.tokens, ignore_end_of_text=True),
        )
    )
    with os.fdopen(options.announce_fd, "w") as pipe, RawHttp2(options.address) as raw:
        # As long as it takes.
        raw.socket.settimeout(None)
        came = 0
        for event in raw.events(raw.call(body)):
            before, came = came, came + len(event.tokens.ids)
            if before < FIRST <= came:
                print(RUNS, file=pipe, flush=True)
        print(ENDED, file=pipe, flush=True)


if __name__ == "__main__":
    main()
