"""The clients of `churn.py`: what they ask, how they leave, and what they were told.

Each client is a thread with random numbers of its own, so that what it asks for next follows from
the seed and from nothing that others do. Nothing here waits for a time to pass before it counts
something: a slow machine makes fewer requests, no other counts.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

import grpc
from churn_calls import (
    POINTS,
    Asked,
    Kept,
    UnexpectedError,
    events_of,
    ids_of,
    read_rest,
    read_until,
)
from many_streams import VOCABULARY, undisturbed
from raw_http2 import ConnectionEndedError, RawHttp2, message, prefixed

import kvmesh
from kvmesh.client.request import RequestClass
from kvmesh.v1 import inference_pb2 as wire

CONTEXT_TOKENS = 8_192
"""What the workers' model takes; a request for more is refused."""
HEADS, HEAD_TOKENS = 12, 256
"""Beginnings that prompts have in common with others."""
SHARED = 0.3
"""Of the prompts that have one."""
OWN_TOKENS = (16, 64, 200, 600)
LONG_TOKENS = 4_000
"""Own tokens of a prompt, and of one in fifty."""
OUTPUT_TOKENS = (4, 80)
ENDLESS = 2_000
"""What those ask for who leave before."""
PAUSE_S = 0.5
"""Mean time that a client does nothing between two requests."""
SLOW_WINDOW = 256
"""Bytes that may be on their way to a client that reads slowly."""
RESUME_PATH = "/kvmesh.v1.Inference/Resume"
NOT_YET, UNKNOWN, SHED = (
    code.value[0]
    for code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
)
ASK_AGAIN_S = 0.1
JOIN_S = 600.0
"""A client that has not ended after this never does."""
_OWN_CONNECTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""Else the channels of one process share their connections."""

KINDS: Mapping[str, int] = {
    "read": 26, "http": 14, "slow": 4, "stalled": 1, "resumed": 7,
    "left": 22, "http left": 8, "late": 8, "refused": 5, "http refused": 5,
}  # fmt: skip
"""What a client does with a request, and how often."""
ENDS = ("finished", "cancelled", "overdue", "refused", "shed", "given up", "failed", "bad")
"""What becomes of one. Given up: a client that reads nothing, by the router. Shed: told to come
back. Failed: any end that was not asked for. Bad: finished with other tokens than the model's."""


@dataclass
class Tally:
    """What a client has done."""

    kinds: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(KINDS, 0)))
    ends: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(ENDS, 0)))
    left_at: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(POINTS, 0)))
    """Each has all of its keys from the begin: they are added up while their client counts on."""
    continued: int = 0
    """Streams that nobody could resume, so that they were gone on with from what there was."""
    problems: list[str] = field(default_factory=list)
    """Of those that failed or were bad."""

    def end(self, how: str, why: str = "") -> None:
        """One request is over."""
        self.ends[how] += 1
        if why:
            self.problems.append(why)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.kinds + other.kinds, self.ends + other.ends, self.left_at + other.left_at,
            self.continued + other.continued, self.problems + other.problems,
        )  # fmt: skip


class Load:
    """All clients; they ask from now on until `stop`."""

    def __init__(self, endpoints: Sequence[str], clients: int, seed: str) -> None:
        rng = random.Random(f"{seed}/heads")
        heads = [rng.choices(VOCABULARY, k=HEAD_TOKENS) for _ in range(HEADS)]
        self._stopped = threading.Event()
        self._clients = [
            Client(endpoints, heads, f"{seed}/{number}", self._stopped) for number in range(clients)
        ]

    def tally(self) -> Tally:
        """Of all clients. Raises what went wrong in a client itself."""
        total = Tally()
        for client in self._clients:
            if client.broke is not None:
                raise client.broke
            total += client.tally
        return total

    def stop(self) -> Tally:
        """Lets what runs end; nobody is connected any more on return."""
        self._stopped.set()
        until = time.monotonic() + JOIN_S
        for client in self._clients:
            client.join(max(0.0, until - time.monotonic()))
            if client.is_alive():
                raise SystemExit(f"a client that was told to end has not: {client.doing}")
        return self.tally()

    def leave(self) -> None:
        """Nobody is waited for."""
        self._stopped.set()


class Client(threading.Thread):
    """One client: a request after the other, with pauses."""

    def __init__(
        self,
        endpoints: Sequence[str],
        heads: Sequence[Sequence[int]],
        seed: str,
        stopped: threading.Event,
    ) -> None:
        super().__init__(name="client", daemon=True)
        self.tally = Tally()
        self.doing = ""
        """For people: the kind of the request that runs."""
        self.broke: BaseException | None = None
        self._endpoints, self._heads, self._seed, self._stopped = endpoints, heads, seed, stopped
        self._rng = random.Random(seed)
        self._grpc = Kept(
            lambda at: kvmesh.Client(at, options=_OWN_CONNECTIONS), kvmesh.Client.close
        )
        self._http = Kept(http.client.HTTPConnection, http.client.HTTPConnection.close)
        self._ways: Mapping[str, Callable[[str], None]] = {
            "read": self._read, "http": self._read_http, "slow": self._read_slowly,
            "stalled": self._read_nothing, "resumed": self._resume_elsewhere,
            "left": self._leave, "http left": self._leave_http, "late": self._be_late,
            "refused": self._ask_wrongly, "http refused": self._ask_wrongly_by_http,
        }  # fmt: skip
        self.start()

    def run(self) -> None:
        """Until it is told to stop."""
        kinds, weights = list(KINDS), list(KINDS.values())
        try:
            for number in itertools.count():
                # Of each request: how an earlier one went changes nothing of it.
                self._rng = random.Random(f"{self._seed}/{number}")
                if self._stopped.wait(self._rng.expovariate(1 / PAUSE_S)):
                    return
                (self.doing,) = self._rng.choices(kinds, weights)
                self.tally.kinds[self.doing] += 1
                self._ask(self._ways[self.doing], self._rng.choice(self._endpoints))
        except BaseException as error:
            self.broke = error
        finally:
            self._grpc.drop()
            self._http.drop()

    def _ask(self, way: Callable[[str], None], endpoint: str) -> None:
        try:
            way(endpoint)
        except kvmesh.MeshError as error:
            if error.reason == "OVERLOADED":
                self.tally.end("shed")
                self._stopped.wait(error.retry_after_s or 0.0)
            else:
                self._failed(f"{error} ({error.reason})")
        except (ConnectionEndedError, OSError, http.client.HTTPException) as error:
            self._http.drop()
            self._failed(repr(error))
        except UnexpectedError as error:
            self._failed(str(error))

    def _failed(self, why: str) -> None:
        self.tally.end("failed", f"{self.doing}: {why}")

    def _finished(self, asked: Asked, output: Sequence[int]) -> None:
        expected = undisturbed(asked.prompt, asked.tokens)
        if list(output) == expected:
            self.tally.end("finished")
        else:
            self.tally.end("bad", f"{self.doing}: {len(output)} tokens, {expected=}, {output=}")

    # -- what is asked for -----------------------------------------------------

    def _asked(self, tokens: int | None = None) -> Asked:
        rng = self._rng
        head = rng.choice(self._heads) if rng.random() < SHARED else ()
        own = LONG_TOKENS if rng.randrange(50) == 0 else rng.choice(OWN_TOKENS)
        hints: dict[str, Any] = {"request_class": rng.choice(get_args(RequestClass))}
        if rng.randrange(4) == 0:
            # A name that was never said before, and cached blocks that are nobody else's.
            hints["conversation_id"] = f"{rng.getrandbits(64):x}"
        if rng.randrange(8) == 0:
            hints["cache_salt"] = f"{rng.getrandbits(64):x}"
        return Asked(
            [*head, *rng.choices(VOCABULARY, k=own)], tokens or rng.randint(*OUTPUT_TOKENS), hints
        )

    # -- gRPC, by our own client -----------------------------------------------

    def _read(self, endpoint: str) -> None:
        asked = self._asked()
        client = self._grpc.take(self._rng, endpoint)
        self._finished(asked, ids_of(client.generate(**asked.options())))

    def _be_late(self, endpoint: str) -> None:
        asked = self._asked()
        client = self._grpc.take(self._rng, endpoint)
        # From before it is placed to long after its first tokens.
        timeout = self._rng.choice((0.002, 0.02, 0.1, 0.4)) * self._rng.uniform(0.5, 1.5)
        try:
            output = ids_of(client.generate(timeout=timeout, **asked.options()))
        except kvmesh.MeshError as error:
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            self.tally.end("overdue")
        else:
            self._finished(asked, output)

    def _ask_wrongly(self, endpoint: str) -> None:
        client = self._grpc.take(self._rng, endpoint)
        options: dict[str, Any] = {
            "token_ids": self._rng.choices(VOCABULARY, k=50),
            "max_tokens": 4,
        }
        options |= self._rng.choice(
            (
                {"token_ids": self._rng.choices(VOCABULARY, k=CONTEXT_TOKENS + 1)},
                {"temperature": -1.0}, {"top_p": 2.0}, {"token_ids": [1 << 20]},
            )
        )  # fmt: skip
        try:
            for _ in client.generate(**options):
                raise UnexpectedError(f"{list(options)} were accepted")
        except (kvmesh.InvalidRequestError, kvmesh.ModelNotFoundError):
            self.tally.end("refused")

    # -- gRPC, frame by frame --------------------------------------------------

    def _leave(self, endpoint: str) -> None:
        """Some calls on one connection; all are left, the last one perhaps without a word."""
        with RawHttp2(endpoint) as raw:
            for _ in range(self._rng.randint(1, 4)):
                asked = self._asked(ENDLESS)
                point = self._rng.choice(POINTS)
                # One that is resumable and whose client vanishes is kept for a while, in vain.
                resumable = self._rng.randrange(4) == 0
                stream = raw.call(message(asked.request(resumable=resumable)))
                if not read_until(raw, stream, point, self._rng):
                    self._ended(raw, stream)
                    continue
                self.tally.left_at[point] += 1
                self.tally.end("cancelled")
                if self._rng.randrange(3) == 0:
                    raw.vanish()
                    return
                raw.reset(stream)

    def _read_slowly(self, endpoint: str) -> None:
        asked = self._asked()
        with RawHttp2(endpoint, window=SLOW_WINDOW) as raw:
            stream = raw.call(message(asked.request()))
            output: list[int] = []
            if read_rest(raw, stream, output, lambda: time.sleep(self._rng.uniform(0.0, 0.05))):
                self._finished(asked, output)
            else:
                self._ended(raw, stream)

    def _read_nothing(self, endpoint: str) -> None:
        """It is given up by the router, or leaves: which of both comes first does not matter."""
        with RawHttp2(endpoint, window=SLOW_WINDOW) as raw:
            raw.call(message(self._asked(ENDLESS).request()))
            self._stopped.wait(self._rng.uniform(1.0, 12.0))
        self.tally.end("given up")

    def _resume_elsewhere(self, endpoint: str) -> None:
        asked = self._asked()
        elsewhere = self._rng.choice([other for other in self._endpoints if other != endpoint])
        wanted = self._rng.randrange(asked.tokens)
        accepted: wire.Accepted | None = None
        output: list[int] = []
        with RawHttp2(endpoint) as raw:
            stream = raw.call(message(asked.request(resumable=True)))
            for event in raw.events(stream):
                if event.HasField("accepted"):
                    accepted = event.accepted
                output += event.tokens.ids
                if accepted and len(output) >= wanted:
                    break
            if accepted is None:
                self._ended(raw, stream)
                return
            if self._rng.randrange(2):
                raw.vanish()
            with RawHttp2(elsewhere) as other:
                self._take_up(other, asked, accepted, output)

    def _take_up(
        self, raw: RawHttp2, asked: Asked, accepted: wire.Accepted, output: list[int]
    ) -> None:
        """The rest of a stream, as our own client asks for it where its router is gone."""
        while True:
            resume = wire.ResumeRequest(
                generation_id=accepted.generation_id, next_index=len(output), token_ids=output
            )
            stream = raw.call(prefixed(resume.SerializeToString()), path=RESUME_PATH)
            if read_rest(raw, stream, output):
                self._finished(asked, output)
                return
            if (status := raw.ended_with(stream)) != NOT_YET:
                break
            if self._stopped.wait(ASK_AGAIN_S):
                self.tally.end("cancelled")
                return
        # Nobody has it: it was not placed yet, or its worker has been replaced.
        if status == UNKNOWN:
            self.tally.continued += 1
            request = asked.request()
            request.continue_from.token_ids.extend(output)
            request.continue_from.seed = accepted.seed
            stream = raw.call(message(request))
            if read_rest(raw, stream, output):
                self._finished(asked, output)
                return
        self._ended(raw, stream)

    def _ended(self, raw: RawHttp2, stream: int) -> None:
        """A call has ended by itself, and not well."""
        status = raw.ended_with(stream)
        if status == SHED:
            self.tally.end("shed")
        elif status is None:
            # Reset by the router: its window was shut for too long.
            self.tally.end("given up")
        else:
            raise UnexpectedError(f"status {status}")

    # -- OpenAI's HTTP ---------------------------------------------------------

    def _read_http(self, endpoint: str) -> None:
        asked = self._asked()
        streams = self._rng.randrange(3) > 0
        answer = self._post(endpoint, {**asked.body(), "stream": streams})
        if answer.status != http.client.OK:
            self._turned_away(answer)
        elif streams:
            self._finished(asked, [token for part in events_of(answer) for token in part])
        else:
            self._finished(asked, json.loads(answer.read())["choices"][0]["token_ids"])

    def _leave_http(self, endpoint: str) -> None:
        asked = self._asked(ENDLESS)
        answer = self._post(endpoint, {**asked.body(), "stream": True})
        if answer.status != http.client.OK:
            self._turned_away(answer)
            return
        events = self._rng.choice((0, 1, 1, 2, self._rng.randrange(40)))
        for _, _ in zip(range(events), events_of(answer), strict=False):
            pass
        answer.close()
        self._http.drop()
        self.tally.end("cancelled")

    def _ask_wrongly_by_http(self, endpoint: str) -> None:
        wrong = self._rng.choice(
            (
                {"prompt": self._rng.choices(VOCABULARY, k=CONTEXT_TOKENS + 1)},
                {"temperature": -1.0}, {"model": f"no-{self._rng.getrandbits(32):x}"},
                {"stop": 7}, {"max_tokens": -1}, None,
            )
        )  # fmt: skip
        body = self._asked().body()
        answer = self._post(endpoint, "{" if wrong is None else {**body, **wrong})
        answer.read()
        if answer.status not in (http.client.BAD_REQUEST, http.client.NOT_FOUND):
            raise UnexpectedError(f"{wrong and list(wrong)}: status {answer.status}")
        self.tally.end("refused")

    def _post(self, endpoint: str, body: Mapping[str, Any] | str) -> http.client.HTTPResponse:
        connection = self._http.take(self._rng, endpoint)
        text = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", "/v1/completions", text, {"content-type": "application/json"})
        return connection.getresponse()

    def _turned_away(self, answer: http.client.HTTPResponse) -> None:
        text = answer.read().decode(errors="replace")
        if answer.status == http.client.TOO_MANY_REQUESTS:
            self.tally.end("shed")
            self._stopped.wait(float(answer.headers.get("retry-after", "0")))
        else:
            raise UnexpectedError(f"status {answer.status}: {text[:300]}")
