"""The thread between a worker and its vLLM engine core, which is another process.

An event loop of its own: commands of the worker go to the core in the order in
which they came, what a step of the core brought goes to the sink in one call,
and cache events come beside. Nothing here is done a token.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kvmesh.engine.contract import AttemptId, OutputSink, Placement, StepOutput, StepSample
from kvmesh.engine.vllm import border
from kvmesh.engine.vllm.answers import Answers
from kvmesh.engine.vllm.attempts import Phase
from kvmesh.engine.vllm.border import CoreClient, CoreConfig, CoreOutputs, CoreRequest
from kvmesh.engine.vllm.cache import VllmCache
from kvmesh.engine.vllm.feed import EventFeed
from kvmesh.engine.vllm.gate import Gate
from kvmesh.engine.vllm.outputs import Outputs
from kvmesh.engine.vllm.placements import Placements, Prepared
from kvmesh.engine.vllm.state import State
from kvmesh.v1 import worker_pb2 as wire

_log = logging.getLogger(__name__)

_SHUTDOWN_S = 5.0
"""Time that the core has to end."""

AGAIN_S = 0.5
"""Before cache events that broke off are asked for again."""

_TURN_S = 0.1
"""Turns of the core without a step are looked at this often."""


class Nobody:
    """Hears what an engine says that was not started."""

    def begin_step(self, predicted_ms: float) -> None:
        """Nothing."""

    def step(self, output: StepOutput) -> None:
        """Nothing."""

    def ended(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the core publishes its cache events."""

    events: str
    replay: str


class Starter(Protocol):
    """Starts a core: `border.Vllm`."""

    def start_core(self, config: CoreConfig) -> CoreClient:
        """In the running event loop. Raises VllmError."""


@dataclass(frozen=True, slots=True)
class Started:
    """A core that has its model."""

    config: CoreConfig
    tasks: tuple[str, ...]


Command = Callable[["CoreLoop"], None]


class CoreLoop:
    """Owns the core's client; everything but `post` and `closed` is of its thread."""

    outputs_kind: type[Outputs] = Outputs
    core_name = "vLLM's engine core"
    """For people."""

    def __init__(
        self,
        vllm: Starter,
        config: CoreConfig,
        endpoints: Endpoints | None,
        adapters: Mapping[str, object] | None = None,
    ) -> None:
        """`endpoints` None: the core has no cache events. `adapters`: vLLM's own, by name."""
        self._vllm = vllm
        self._adapters = adapters or {}
        self._config = config
        self._endpoints = endpoints
        self.sink: OutputSink = Nobody()
        """Set by a command."""
        self._answers = Answers()
        self._client: CoreClient
        self._state: State
        self._cache: VllmCache
        self._placements: Placements
        self._outputs: Outputs
        self._gate = Gate(lambda: len(self._state.by_request) + len(self._state.aborting))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requests: deque[CoreRequest | list[str]] = deque()
        """For the core, in order; a list: to be aborted."""
        self._to_send: asyncio.Event
        self._closing: asyncio.Event
        self._turned_at = 0.0
        self._confirms: set[asyncio.Task[None]] = set()
        self.on_sample: Callable[[StepSample], object] = lambda sample: None
        """Hears of each step; for the warm-up."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._up = threading.Event()
        self._outcome: Started | border.VllmError | None = None
        self.ended_by_itself = False
        self.over = False
        """It has ended, or is about to; from any thread."""

    # -- from any thread ---------------------------------------------------

    def start_core(self) -> Started:
        """Starts the core and waits until it has its model. Raises VllmError."""
        self._thread.start()
        self._up.wait()
        if isinstance(self._outcome, Started):
            return self._outcome
        self._thread.join()
        raise self._outcome or border.VllmError("vLLM's engine core did not start")

    def attach(self, state: State, cache: VllmCache, placements: Placements) -> None:
        """What it works on; once, before the first command."""
        self._state, self._cache, self._placements = state, cache, placements
        self._outputs = self.outputs_kind(state, self._answers, self._gate, placements)
        self.post(lambda loop: loop._follow())

    def post(self, command: Command) -> None:
        """Has something done by the thread. Ignored once it has ended."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(command, self)
        except RuntimeError:
            # The loop is closed: nothing runs any more.
            _log.debug("command after the end")

    def stop(self) -> None:
        """Ends everything. Returns when the thread has ended."""
        self.post(lambda loop: loop._closing.set())
        if self._thread.ident is not None:
            self._thread.join()

    # -- life --------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._run_main()
        except border.VllmError as error:
            self._outcome = error
        except Exception:
            _log.exception("the engine has failed")
        finally:
            self._up.set()
            # In this order: who sets a sink later sees that it will hear nothing.
            self.over = True
            self.sink.ended()

    def _run_main(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._to_send, self._closing = asyncio.Event(), asyncio.Event()
        # An interrupt from the terminal is the worker's to answer: the core
        # would end at once, and with it every stream.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._client = self._vllm.start_core(self._config)
        try:
            tasks = tuple(await self._client.get_supported_tasks_async())
            for name, adapter in self._adapters.items():
                await self._load(name, adapter)
            self._loop = asyncio.get_running_loop()
            self._outcome = Started(self._config, tasks)
            self._up.set()
            await self._serve()
        finally:
            self._loop = None
            # Waits for the process: no other thread needs this one meanwhile.
            self._client.shutdown(timeout=_SHUTDOWN_S)

    async def _load(self, name: str, adapter: object) -> None:
        """Has the core load an adapter before the first request. One that it would load for a
        request, within a step, and cannot, would end it. Raises VllmError."""
        loading = asyncio.ensure_future(self._client.add_lora_async(adapter))
        # A core that has gone says so here alone.
        ended = asyncio.ensure_future(self._client.get_output_async())
        try:
            await asyncio.wait((loading, ended), return_when=asyncio.FIRST_COMPLETED)
            first = loading if loading.done() else ended
            error = first.exception()
            if first is ended or error is not None or not loading.result():
                raise border.VllmError(
                    f"{self.core_name} cannot load the LoRA adapter {name!r}: "
                    + ("it says no more" if error is None else border.short(error))
                    + f"; engine_arguments lora.{name} has its folder"
                ) from error
        finally:
            for task in (loading, ended):
                task.cancel()
            await asyncio.gather(loading, ended, return_exceptions=True)

    async def _serve(self) -> None:
        """Until it is closed, or the core has ended."""
        closing = asyncio.create_task(self._closing.wait(), name="closing")
        tasks: set[asyncio.Task[Any]] = {
            closing,
            asyncio.create_task(self._read(), name="outputs"),
            asyncio.create_task(self._send(), name="requests"),
        }
        self._tasks = tasks
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if closing not in done:
                self.ended_by_itself = True
            for task in done:
                task.result()
        except Exception as error:
            if not self._closing.is_set():
                kind = type(error).__name__
                # The core has said why; anything else is a fault of ours.
                ours = None if kind == "EngineDeadError" else error
                known = isinstance(error, border.VllmError)
                _log.error(
                    "%s has ended: %s: %s", self.core_name, kind, error,
                    exc_info=None if known else ours,
                )  # fmt: skip
        finally:
            for task in (*tasks, *self._confirms):
                task.cancel()
            await asyncio.gather(*tasks, *self._confirms, return_exceptions=True)

    def _follow(self) -> None:
        """Begins to read cache events."""
        if self._endpoints is not None:
            self._tasks.add(asyncio.create_task(self._read_cache(), name="cache events"))

    async def _read_cache(self) -> None:
        """Follows the core's cache until it is cancelled. Whenever the feed begins anew, what was
        known is forgotten: events may have been missed."""
        while True:
            try:
                await self._read_feed()
            except Exception:
                # Whatever it was, routers go on to take the index for exact.
                _log.exception("cache events broke off")
            self._cache.clear()
            self._tell_changes()
            await asyncio.sleep(AGAIN_S)

    async def _read_feed(self) -> None:
        """Applies cache events for as long as they come."""
        if self._endpoints is None:
            raise AssertionError("the core has no cache events")
        events, replay = self._endpoints.events, self._endpoints.replay
        await EventFeed(events, replay, self._cache, self._tell_changes).run()

    # -- the core's outputs ------------------------------------------------

    async def _read(self) -> None:
        while True:
            self._take(await self._client.get_output_async())

    def _take(self, outputs: CoreOutputs) -> None:
        """One step of the core: one call to the sink."""
        state, stats = self._state, outputs.scheduler_stats
        now = time.monotonic()
        known = [
            (attempt, output)
            for output in outputs.outputs
            if (attempt := state.by_request.get(output.request_id)) is not None
        ]
        # What the step held is told of the attempts as they were.
        decoded = [a.length for a, _ in known if a.phase is Phase.DECODING]
        sample = state.end_step(outputs, decoded)
        for attempt, output in known:
            self._outputs.advance(attempt, output, now)
        if sample is None and not outputs.outputs:
            self._turned(stats, now)
            return
        if sample is None and stats is not None:
            state.saw(stats)
        self._admit()
        state.count(len(self._cache))
        if sample is not None:
            self.on_sample(sample)
        load, cache = state.load(), self._cache.drain()
        self.sink.step(StepOutput(state.step, self._answers.take(), sample, load, cache))
        self._begin()

    def _turned(self, stats: border.CoreStats | None, now: float) -> None:
        """While blocks come or go the core turns a thousand times a second, computing nothing."""
        if stats is not None and self._state.saw(stats):
            self._tell_changes()
        if now - self._turned_at >= _TURN_S:
            self._turned_at = now
            # It is alive: what it waits for is no step that grows old.
            self._state.stand()
            self._begin()

    def _begin(self) -> None:
        """A step begins, if there is work and none is known to run."""
        predicted_ms = self._state.begin_step(time.monotonic())
        if predicted_ms is not None:
            self.sink.begin_step(predicted_ms)

    # -- the worker's commands ---------------------------------------------

    def serve(self, sink: OutputSink) -> None:
        """From now on the worker hears what the engine says."""
        self._cache.restart()
        self.sink = sink
        self._state.count(0)
        sink.step(StepOutput(0, {}, None, self._state.load()))

    def submit(self, placement: Placement) -> None:
        """Answers a placement; where it is reserved, its stage will end once."""
        try:
            prepared = self._placements.prepare(placement, self._state.attempts)
        except Exception:
            # Every placement is answered, also one that nobody thought of.
            _log.exception("placement not taken generation=%s", placement.id.generation.hex())
            opening = placement.id.opening(placement.stage)
            prepared = Prepared(opening, problem="the placement cannot be taken")
        attempt = prepared.attempt
        if attempt is None:
            self._answers.refused(
                placement.router, prepared.opening, prepared.problem, prepared.path
            )
            if prepared.release is not None:
                # Whoever computed the prompt holds its blocks until they are taken.
                self._tell_core(prepared.release)
        else:
            self._state.attempts[attempt.id] = attempt
            self._answers.reserved(attempt, prepared.reserved_tokens)
            self._waiting[attempt.id] = prepared
            self._gate.add(attempt)
            self._admit()
        self._tell_changes()
        self._begin()

    def _admit(self) -> None:
        """Gives vLLM what may go to it now."""
        state = self._state
        while (attempt := self._gate.next()) is not None:
            prepared = self._placements.take(attempt.id)
            if prepared.request is None:
                raise AssertionError("an attempt was let in without its request")
            attempt.phase = Phase.RECEIVING if prepared.receives else Phase.WAITING
            state.by_request[attempt.request_id] = attempt
            self._tell_core(prepared.request)

    @property
    def _waiting(self) -> dict[AttemptId, Prepared]:
        return self._placements.waiting

    def cancel(self, attempts: Iterable[AttemptId]) -> None:
        """Ends attempts. vLLM is told at once, and says when they are gone."""
        aborted: list[str] = []
        for id in attempts:
            attempt = self._state.attempts.get(id)
            if attempt is None:
                continue
            prepared = self._waiting.pop(id, None)
            if prepared is not None and prepared.request is not None and prepared.receives:
                # Accepted, then aborted: so its connector lets the blocks go elsewhere.
                prepared.request.abort_immediately = True
                self._tell_core(prepared.request)
            elif prepared is None:
                aborted.append(attempt.request_id)
            self._outputs.leave(attempt)
            self._answers.end(attempt, cancelled=wire.Cancelled())
        if aborted:
            self._state.aborting.update(aborted)
            self._tell_core(aborted)
        self._admit()
        if not self._state.busy:
            self._state.stand()
        self._tell_changes()
        self._begin()

    def _tell_core(self, request: CoreRequest | list[str]) -> None:
        self._requests.append(request)
        self._to_send.set()

    async def _send(self) -> None:
        """Requests and aborts, in order."""
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while self._requests:
                request = self._requests.popleft()
                if isinstance(request, list):
                    await self._client.abort_requests_async(request)
                    task = asyncio.create_task(self._confirm(request), name="abort")
                    self._confirms.add(task)
                    task.add_done_callback(self._confirms.discard)
                else:
                    await self._client.add_request_async(request)

    async def _confirm(self, aborted: list[str]) -> None:
        """The core answers in order: by this answer it has done the abort."""
        try:
            await self._client.get_supported_tasks_async()
        except Exception as error:
            # The core has gone, which is said where its outputs are read.
            _log.debug("abort not confirmed: %s", error)
            return
        self._state.aborting.difference_update(aborted)
        self._admit()
        self._tell_changes()
        self._begin()

    # -- between steps -----------------------------------------------------

    def _tell_changes(self) -> None:
        """What came between steps, if anything did."""
        routers = self._answers.take()
        cache = self._cache.drain()
        if self._state.count(len(self._cache)) or routers or cache is not None:
            self.sink.step(StepOutput(0, routers, None, self._state.load(), cache))

    async def _reset_cache(self) -> None:
        await self._client.reset_prefix_cache_async()

    def reset_cache(self, done: Callable[[], object]) -> None:
        """Forgets all cached prefixes; `done` is called then."""
        task = asyncio.create_task(self._reset_cache(), name="reset")
        self._confirms.add(task)
        task.add_done_callback(self._confirms.discard)
        task.add_done_callback(lambda _: done())
