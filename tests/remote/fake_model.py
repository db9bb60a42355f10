"""The engine behind the fake servers: a token a step for each request.

As vLLM's: a request is known by its name once its call has been read, an abort of what is
not known is nothing, and a request whose stream was dropped runs on until it is aborted.
The next token is a function of the tokens before it (`fake_core.next_token`).
"""

import asyncio
import io
import json
import os
import zipfile
from dataclasses import dataclass, field

from fake_core import next_token

from kvmesh.engine.sim.vocabulary import tokenizer_files

VOCABULARY = 2000
CONTEXT = 4096
BLOCK = 16
BLOCKS = 1000
MODEL = "fake-model"
END = 2
STOP, LENGTH, ABORT = "stop", "length", "abort"


def files() -> dict[str, bytes]:
    """Of the model's tokeniser."""
    return {
        **tokenizer_files(VOCABULARY, ""),
        "generation_config.json": json.dumps({"eos_token_id": [END]}).encode(),
    }


def archive() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as made:
        for name, content in files().items():
            made.writestr(name, content)
    return packed.getvalue()


@dataclass
class Running:
    """A request that the engine has."""

    prompt: list
    most: int
    least: int = 0
    stops: tuple = ()
    transfer: dict | None = None
    output: list = field(default_factory=list)
    aborted: bool = False


@dataclass
class Made:
    """What a step brought for a request."""

    ids: list
    finish: str | None = None
    stop: int | None = None
    transfer: dict | None = None


class FakeModel:
    """What runs."""

    def __init__(self, step_s=0.0, connector="", slow_while="") -> None:
        """`slow_while`: while a file of this name exists a step takes ten times as long."""
        self.step_s = step_s
        self.slow_while = slow_while
        self.connector = connector
        self.running: dict[str, Running] = {}
        self.seen: list[tuple[str, str]] = []
        """Names of what came: ("add", id), ("abort", id)."""
        self.aborts = 0
        self.kept: dict[str, int] = {}
        """Blocks of prefills that nobody has taken yet."""
        self.admit = asyncio.Event()
        """Requests are read when it is set."""
        self.admit.set()
        self.hold = asyncio.Event()
        """Steps are made when it is set."""
        self.hold.set()
        self.fail: Exception | None = None
        """What the next request fails with."""
        self.feeds: list[asyncio.Queue] = []
        self.cached = 0
        """Tokens of each prompt that it says it had."""
        self.prompts: list[tuple] = []
        """Of all requests that were read."""
        self.requests: list = []
        """As they were on the wire."""

    def abort(self, name: str) -> None:
        self.aborts += 1
        # One that is told again is still one.
        if name in self.running and not self.running[name].aborted:
            self.seen.append(("abort", name))
            self.running[name].aborted = True

    async def run(self, name, request: Running):
        """A token a step."""
        await self.admit.wait()
        self.seen.append(("add", name))
        self.prompts.append(tuple(request.prompt))
        self.running[name] = request
        over = False
        try:
            while not over:
                await asyncio.sleep(self._step_takes_s())
                await self.hold.wait()
                made = self._step(name, request)
                over = made.finish is not None
                if over:
                    self.running.pop(name, None)
                yield made
        finally:
            if request.aborted:
                self.running.pop(name, None)

    def _step_takes_s(self) -> float:
        slow = self.slow_while and os.path.exists(self.slow_while)
        return self.step_s * (10 if slow else 1)

    def _step(self, name, request) -> Made:
        transfer = request.transfer or {}
        if request.aborted:
            if transfer.get("do_remote_prefill") and not request.output:
                self.kept.pop(transfer["remote_request_id"], None)
            return Made([], ABORT)
        if transfer.get("do_remote_prefill"):
            self.kept.pop(transfer["remote_request_id"], None)
        token = next_token([*request.prompt, *request.output])
        if not request.output:
            self._cached(request.prompt)
        request.output.append(token)
        if token in request.stops and len(request.output) > request.least:
            return Made([token], STOP, token)
        if len(request.output) < request.most:
            return Made([token])
        said = None
        if transfer.get("do_remote_decode"):
            self.kept[name] = -(-len(request.prompt) // BLOCK)
            said = {"do_remote_prefill": True, "remote_request_id": name}
        return Made([token], LENGTH, transfer=said)

    def _cached(self, prompt) -> None:
        whole = prompt[: len(prompt) // BLOCK * BLOCK]
        for feed in self.feeds:
            feed.put_nowait(("stored", whole))

    def clear(self) -> None:
        for feed in self.feeds:
            feed.put_nowait(("cleared", ()))

    @property
    def usage(self) -> float:
        held = sum(-(-(len(r.prompt) + len(r.output)) // BLOCK) for r in self.running.values())
        return (held + sum(self.kept.values())) / BLOCKS

    @property
    def waiting(self) -> int:
        return sum(not request.output for request in self.running.values())
