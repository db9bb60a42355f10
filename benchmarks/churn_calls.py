"""What the clients of `churn.py` ask with: requests, connections that are kept, and how answers are
read to their end or to where one leaves."""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

from raw_http2 import RawHttp2

import kvmesh
from kvmesh.client.request import build_request
from kvmesh.v1 import inference_pb2 as wire

T = TypeVar("T")

MODEL = "sim"
CALLS_A_CONNECTION = 8
ANEW = 0.3
"""Of the requests that get a connection of their own."""
IDLE_S = 20.0
"""A connection that was idle for longer is not used again: the router may be about to close it."""
POINTS = ("unanswered", "placing", "accepted", "moving", "first token", "more tokens")
"""Where one leaves: at once, some milliseconds after it asked, when it was accepted, some
milliseconds after that (its prompt is computed and its KV moves), at its tokens."""


class UnexpectedError(Exception):
    """An answer that a client should not get."""


@dataclass(frozen=True)
class Asked:
    """A request, and so its output."""

    prompt: list[int]
    tokens: int
    hints: Mapping[str, Any]

    def options(self) -> dict[str, Any]:
        """For our own client."""
        return {
            "token_ids": self.prompt,
            "max_tokens": self.tokens,
            "ignore_end_of_text": True,
            **self.hints,
        }

    def request(self, *, resumable: bool = False) -> wire.GenerateRequest:
        """As gRPC has it."""
        return build_request({**self.options(), "resumable": resumable})  # type: ignore[typeddict-item]

    def body(self) -> dict[str, Any]:
        """As OpenAI's HTTP has it."""
        salt = {key: self.hints[key] for key in ("cache_salt",) if key in self.hints}
        return {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            **salt,
        }


class Kept(Generic[T]):
    """A connection that is used for some requests, and then another one."""

    def __init__(self, connect: Callable[[str], T], close: Callable[[T], None]) -> None:
        self._connect, self._close = connect, close
        self._open: T | None = None
        self._calls = 0
        self._used = 0.0

    def take(self, rng: random.Random, endpoint: str) -> T:
        """One for the next request. Who is connected stays with the router that it found."""
        now = time.monotonic()
        # Drawn in any case: what is drawn after it hangs on no time.
        anew = rng.random() < ANEW
        if anew or self._calls >= CALLS_A_CONNECTION or now - self._used > IDLE_S:
            self.drop()
        if self._open is None:
            self._open, self._calls = self._connect(endpoint), 0
        self._calls += 1
        self._used = now
        return self._open

    def drop(self) -> None:
        """Closes it."""
        if self._open is not None:
            self._close(self._open)
            self._open = None


def ids_of(events: Iterator[kvmesh.Event]) -> list[int]:
    """A whole output."""
    return [token for event in events if isinstance(event, kvmesh.Tokens) for token in event.ids]


def read_rest(
    raw: RawHttp2, stream: int, output: list[int], pause: Callable[[], None] = lambda: None
) -> bool:
    """Reads a call to its end, with a pause after each message. Whether it ended well."""
    finished = False
    for event in raw.events(stream):
        output += event.tokens.ids
        finished |= event.HasField("finished")
        pause()
    return finished


def read_until(raw: RawHttp2, stream: int, point: str, rng: random.Random) -> bool:
    """Reads a call to where it is left. False: it ended before."""
    if point == "unanswered":
        return True
    if point == "placing":
        time.sleep(rng.uniform(0.0, 0.02))
        return True
    wanted = {"first token": 1, "more tokens": rng.randint(2, 60)}.get(point, 0)
    tokens = 0
    for event in raw.events(stream):
        tokens += len(event.tokens.ids)
        if tokens >= wanted:
            if point == "moving":
                time.sleep(rng.uniform(0.0, 0.06))
            return True
    return False


def events_of(answer: http.client.HTTPResponse) -> Iterator[list[int]]:
    """Token ids of each event of a streamed answer, to its good end."""
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        text = line.removeprefix(b"data: ").strip()
        if text == b"[DONE]":
            answer.read()
            return
        event = json.loads(text)
        if "error" in event:
            raise UnexpectedError(str(event["error"]))
        yield [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
    raise UnexpectedError("a stream without an end")
