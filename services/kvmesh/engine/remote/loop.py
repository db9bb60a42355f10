"""The loop of engine/vllm, with a server in place of the core."""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import cache
from typing import cast

from kvmesh.engine.contract import OutputSink
from kvmesh.engine.remote.core import Output, Outputs, RemoteCore, Starter
from kvmesh.engine.remote.server import Description, ServerError
from kvmesh.engine.vllm import loop
from kvmesh.engine.vllm import outputs as core_outputs
from kvmesh.engine.vllm.attempts import Attempt
from kvmesh.engine.vllm.border import CoreConfig, CoreOutput, CoreOutputs, CoreStats
from kvmesh.v1 import worker_pb2 as wire

_log = logging.getLogger(__name__)

_making = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """One for all servers of this process, and for good: grpc.aio goes on to wake every event
    loop that it was ever used in, and fails at one that is closed."""
    with _making:
        return _made_event_loop()


@cache
def _made_event_loop() -> asyncio.AbstractEventLoop:
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="servers", daemon=True).start()
    return made


class RemoteOutputs(core_outputs.Outputs):
    """Ends that say what the server said."""

    def advance(self, attempt: Attempt, output: CoreOutput, now: float) -> None:
        """Takes what came for an attempt. A server may say with its end alone what it had
        of the prompt."""
        late = cast("Output", output).late_stats
        if late is not None:
            attempt.cached_tokens = late.num_local_cached_tokens
            attempt.computed_tokens = late.num_computed_tokens
            if attempt.trace is not None:
                attempt.trace.recount("prefill_chunk", late.num_computed_tokens)
        super().advance(attempt, output, now)

    def failure(self, output: CoreOutput) -> wire.StageFailed:
        """Why a request ended without finishing."""
        told = cast("Output", output).failure
        return super().failure(output) if told is None else told


class RemoteLoop(loop.CoreLoop):
    """Owns a server's client."""

    outputs_kind = RemoteOutputs
    core_name = "the server"

    def __init__(self, starter: Starter) -> None:
        self._starter = starter
        super().__init__(cast("loop.Starter", starter), cast("CoreConfig", None), None)

    @property
    def description(self) -> Description:
        """Once it has started."""
        return self._starter.core.description

    @property
    def _core(self) -> RemoteCore:
        return self._starter.core

    def _run_main(self) -> None:
        asyncio.run_coroutine_threadsafe(self._main(), event_loop()).result()

    async def _serve(self) -> None:
        try:
            await super()._serve()
        finally:
            await self._core.close()

    def _take(self, outputs: CoreOutputs) -> None:
        came, stats = cast("Outputs", outputs), cast("CoreStats", outputs.scheduler_stats)
        if came.over:
            self._state.stand()
        if came.outputs:
            super()._take(outputs)
        elif self._state.saw(stats) or came.over:
            self._tell_changes()
            self._begin()

    def serve(self, sink: OutputSink) -> None:
        """From now on the worker hears what the server says."""
        self._core.trusts_prompts = False
        super().serve(sink)

    # -- its cache -----------------------------------------------------------

    def _follow(self) -> None:
        geometry = self._state.geometry
        self._core.pool_tokens = geometry.pool_blocks * geometry.block_tokens
        self._core.watch()
        if self.description.cache_events:
            self._tasks.add(asyncio.create_task(self._read_cache(), name="cache events"))

    async def _read_feed(self) -> None:
        try:
            await self._read_batches()
        except ServerError as error:
            _log.info("cache events broke off: %s", error)

    async def _read_batches(self) -> None:
        begun = False
        async for batch in self._core.server.cache_batches():
            if batch.load is not None:
                self._core.loaded(batch.load)
            number = batch.number
            if number is None:
                continue
            missing = self._cache.hear(number) if begun else number - 1
            if missing is not None and missing >= number:
                continue
            if missing is not None:
                if begun:
                    _log.warning("cache events lost first=%d before=%d", missing, number)
                # What is known is wrong from here on, or of a feed before this one.
                self._cache.clear(number)
                self._cache.hear(number)
            begun = True
            self._cache.apply((0.0, batch.events))
            self._tell_changes()
