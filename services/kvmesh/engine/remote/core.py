"""A server as an engine core: what `engine/vllm/loop.py` reads and tells.

Each request is a stream of the server's; what came of all of them together goes to the
loop in one batch. Python pays for each message here, as there is one a token and stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from kvmesh.engine.remote.server import (
    Description,
    FailedError,
    Load,
    Logprobs,
    LostError,
    Part,
    Request,
    Server,
    ServerError,
    UnreachableError,
    failure,
)
from kvmesh.engine.remote.steps import Step, Steps, Told
from kvmesh.engine.vllm import border
from kvmesh.engine.vllm.border import CoreConfig, CoreRequest
from kvmesh.v1 import worker_pb2 as wire

_log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Between two looks at a server."""
_MISSES = 3
"""Looks in a row without an answer, after which a server is taken to be gone."""
_PAUSE_S = 0.05
"""Before a second look at a server whose streams broke."""
_ABORT_AGAIN_S = (0.02, 0.05, 0.2, 0.5, 1.0)
"""A server may hear of an abort before it has the request: it is told again."""
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)
"""What reading an answer raises that is not as it should be."""


@dataclass(slots=True)
class PromptStats:
    """As border.PrefillStats."""

    num_computed_tokens: int
    num_local_cached_tokens: int
    num_external_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """As border.CoreEvent."""

    type: int
    timestamp: float


@dataclass(slots=True)
class Output:
    """As border.CoreOutput."""

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    new_logprobs: Logprobs | None = None
    finish_reason: int | None = None
    stop_reason: int | None = None
    events: list[Event] | None = None
    kv_transfer_params: dict[str, object] | None = None
    prefill_stats: PromptStats | None = None
    late_stats: PromptStats | None = None
    """Of a prompt that was taken to be computed in full until now."""
    failure: wire.StageFailed | None = None
    """Why, with finish_reason ERROR."""


@dataclass(slots=True)
class Stats:
    """As border.CoreStats."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_skipped_waiting_reqs: int
    kv_cache_usage: float
    iteration_details: Step | None


@dataclass(slots=True)
class Outputs:
    """As border.CoreOutputs."""

    outputs: list[Output]
    scheduler_stats: Stats
    timestamp: float
    over: bool = False
    """A step has ended, of which not enough is known to learn from."""


@dataclass(slots=True)
class _Run:
    request: Request
    sent_at: float
    """Seconds, monotonic."""
    made: int = 0
    cached: int | None = None
    """Of the prompt, found in the server's cache, as far as it has said."""
    over: bool = False
    """Its end was told; the stream may still have to be closed."""
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class RemoteCore:
    """The client of a server, as border.CoreClient. To be used in one event loop."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.description: Description
        self.pool_tokens = 0
        """Size of the KV pool, as the server says or as it is taken to be. 0: not known yet."""
        self._runs: dict[str, _Run] = {}
        self._outputs: list[Output] = []
        self._told: list[Told] = []
        self._arrived = asyncio.Event()
        self._idle = asyncio.Condition()
        self._lost: LostError | None = None
        self._load: Load | None = None
        self._steps = Steps()
        self._described = False
        self.trusts_prompts = True
        """A prompt of which the server does not say otherwise was computed in full: while
        nobody but the warm-up asks, whose prompts are new."""
        self._watch: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[ServerError | None] | None = None

    # -- as CoreClient -------------------------------------------------------

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """At first asks the server who it is; then answers when what was aborted has ended."""
        if not self._described:
            try:
                self.description = await self.server.describe()
            except BaseException:
                await self.server.close()
                raise
            self._described = True
        else:
            aborted = {name for name, run in self._runs.items() if run.aborted.is_set()}
            async with self._idle:
                await self._idle.wait_for(lambda: not aborted & self._runs.keys())
        return ("generate",)

    async def reset_prefix_cache_async(self) -> bool:
        """Nothing: others may use what is cached."""
        return False

    async def add_request_async(self, request: CoreRequest) -> None:
        """Begins a stream."""
        if not isinstance(request, Request):
            raise TypeError("the request was made for another core")
        now = time.monotonic()
        self._steps.added(now, idle=all(run.over for run in self._runs.values()))
        run = self._runs[request.request_id] = _Run(request, now)
        if request.abort_immediately:
            run.aborted.set()
        run.task = asyncio.create_task(self._run(run), name="stream")

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Nothing more comes of them from now on."""
        for name in request_ids:
            if (run := self._runs.get(name)) is not None:
                run.aborted.set()

    async def get_output_async(self) -> Outputs:
        """What came since the last call. Raises LostError."""
        while True:
            await self._arrived.wait()
            # What came with it comes along.
            await asyncio.sleep(0)
            if self._lost is not None and not self._outputs:
                raise self._lost
            if self._lost is None:
                self._arrived.clear()
            return self._taken()

    def watch(self) -> None:
        """From now on it is seen whether the server is there, and how busy it is."""
        self._watch = asyncio.create_task(self._look(), name="look")

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing is left: `close` comes before it."""

    async def close(self) -> None:
        """Aborts what runs, and drops the connection."""
        for run in self._runs.values():
            run.aborted.set()
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if tasks and self._lost is None:
            await asyncio.wait(tasks, timeout=sum(_ABORT_AGAIN_S))
        rest = [task for task in (*tasks, self._watch, self._checking) if task is not None]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self.server.close()

    # -- what came -----------------------------------------------------------

    def _taken(self) -> Outputs:
        outputs, self._outputs = self._outputs, []
        told, self._told = self._told, []
        now, waiting = time.monotonic(), sum(not run.made for run in self._runs.values())
        closed = self._steps.told(told, now, waiting, len(self._runs))
        stats = Stats(len(self._runs), waiting, 0, self._usage(), closed.step)
        ended = closed.step.ended_at if closed.step is not None else now
        return Outputs(outputs, stats, ended, closed.over)

    def _usage(self) -> float:
        """Share of the pool in use, as the server says, or as our own requests take it."""
        if self._load is not None:
            return min(1.0, max(0.0, self._load.usage))
        held = sum(len(run.request.prompt) + run.made for run in self._runs.values())
        return min(1.0, held / self.pool_tokens) if self.pool_tokens else 0.0

    def loaded(self, load: Load) -> None:
        """The server has said how busy it is."""
        if not load.running and not load.waiting and not self.description.connector:
            # Its figures are of its last step, after which all may have gone.
            load = Load(0, 0, 0.0)
        changed, self._load = load != self._load, load
        if changed:
            self._arrived.set()

    # -- streams -------------------------------------------------------------

    async def _run(self, run: _Run) -> None:
        request = run.request
        stream = asyncio.create_task(self._follow(run), name="messages")
        told = asyncio.create_task(run.aborted.wait(), name="aborted")
        try:
            await asyncio.wait((stream, told), return_when=asyncio.FIRST_COMPLETED)
            if not stream.done():
                await self._abort(request.request_id, stream)
            if stream.done() and not stream.cancelled():
                error = stream.exception()
                await self._ended(run, error)
                if error is not None:
                    await self._let_go(request.request_id)
        finally:
            # Where the server has not ended it by now, the stream is dropped.
            for task in (stream, told):
                task.cancel()
            await asyncio.gather(stream, told, return_exceptions=True)
            del self._runs[request.request_id]
            if self._runs:
                self._steps.left(request.request_id)
            # Its end may be the end of a step.
            self._arrived.set()
            async with self._idle:
                self._idle.notify_all()

    async def _abort(self, name: str, stream: asyncio.Task[None]) -> None:
        """Tells the server until the stream has ended, or for a while."""
        for pause in _ABORT_AGAIN_S:
            try:
                await self.server.abort([name])
            except ServerError as error:
                _log.info("abort not taken request=%s: %s", name, error)
            if self.server.ends_dropped:
                return
            done, _ = await asyncio.wait((stream,), timeout=pause)
            if done:
                return
        _log.warning("abort without effect request=%s; its stream is dropped", name)

    async def _let_go(self, name: str) -> None:
        """Has a server end a request whose stream broke, where that alone does not end it."""
        if self.server.ends_dropped or self._lost is not None:
            return
        try:
            await self.server.abort([name])
        except ServerError as error:
            _log.info("abort after an error not taken request=%s: %s", name, error)

    async def _follow(self, run: _Run) -> None:
        """Reads a stream to its end. Raises ServerError."""
        async with aclosing(self.server.generate(run.request)) as parts:
            async for part in parts:
                if not run.aborted.is_set():
                    self._take(run, part)
                if part.finish_reason is not None:
                    return
        raise FailedError("the server ended the stream before its end")

    def _take(self, run: _Run, part: Part) -> None:
        request, first = run.request, not run.made
        output = Output(
            request.request_id,
            part.ids,
            part.logprobs,
            part.finish_reason,
            part.stop_token_id,
            kv_transfer_params=part.transfer,
        )
        tells = part.cached_tokens is not None
        cached = min(part.cached_tokens or 0, len(request.prompt))
        stats = PromptStats(len(request.prompt) - cached, cached)
        if first and (part.ids or part.finish_reason is not None):
            output.prefill_stats = stats
            # When its step began nobody says: what it waited there counts as its prompt's.
            output.events = [Event(border.SCHEDULED, run.sent_at)]
        elif tells and cached != run.cached:
            output.late_stats = stats
        if tells:
            run.cached = cached
        if part.ids:
            known = tells or self.trusts_prompts
            computed = stats.num_computed_tokens if known else None
            self._told.append(Told(request.request_id, first, computed))
        run.made += len(part.ids)
        run.over = part.finish_reason is not None
        self._outputs.append(output)
        self._arrived.set()

    async def _ended(self, run: _Run, error: BaseException | None) -> None:
        """A stream has ended; with an error that is the attempt's, or the server's."""
        if error is None or run.aborted.is_set():
            return
        if not isinstance(error, ServerError):
            _log.error("a stream failed", exc_info=error)
            error = FailedError(f"the stream could not be read: {type(error).__name__}")
        if error.retryable and (gone := await self._gone()) is not None:
            self._fail(gone)
            return
        name = run.request.request_id
        self._outputs.append(Output(name, finish_reason=border.ERROR, failure=failure(error)))
        self._arrived.set()

    # -- the server ----------------------------------------------------------

    async def _gone(self) -> ServerError | None:
        """Why the server is taken to be gone; None: it is there. One look for all streams that
        broke together."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check(), name="check")
        return await asyncio.shield(self._checking)

    async def _check(self) -> ServerError | None:
        try:
            await self.server.check()
        except LostError as error:
            return error
        except UnreachableError:
            await asyncio.sleep(_PAUSE_S)
            try:
                await self.server.check()
            except UnreachableError as error:
                return error
        return None

    async def _look(self) -> None:
        """Sees that the server is there, and how busy it is."""
        misses = 0
        while True:
            try:
                await self.server.check()
                misses = 0
                await self._ask_load()
            except LostError as error:
                self._fail(error)
            except (UnreachableError, *_UNREADABLE) as error:
                misses += 1
                if misses >= _MISSES:
                    self._fail(error)
            await asyncio.sleep(LOOK_S)

    async def _ask_load(self) -> None:
        """How busy it is; a figure, without which what it said last counts on."""
        try:
            load = await self.server.load()
        except (ServerError, *_UNREADABLE) as error:
            _log.info("the server does not say how busy it is: %s", error)
            return
        if load is not None:
            self.loaded(load)

    def _fail(self, error: Exception) -> None:
        """What runs there is lost: routers go on with it elsewhere."""
        if self._lost is None:
            self._lost = LostError(str(error))
            self._arrived.set()


class Starter:
    """Starts the client of a server, as `loop.Starter` starts a core."""

    def __init__(self, connect: Callable[[], Server]) -> None:
        """`connect` is called in the event loop that will use the server."""
        self._connect = connect
        self.core: RemoteCore

    def start_core(self, config: CoreConfig) -> RemoteCore:
        """In the running event loop."""
        self.core = RemoteCore(self._connect())
        return self.core
