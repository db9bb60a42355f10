"""An engine with vLLM in the tests' own process."""

import asyncio
import os
from contextlib import asynccontextmanager
from unittest.mock import patch

from engine_harness import Driver
from workers import ARGUMENTS, MODEL, POOL_TOKENS

from kvmesh.engine.vllm.served import build
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import WorkerSettings


class Engine:
    """An engine that lives as long as the tests of a module; each has its own driver."""

    def __init__(self, **more) -> None:
        settings = WorkerSettings(
            engine="vllm",
            model=MODEL,
            kv_pool_tokens=POOL_TOKENS,
            log_level="warn",
            vllm_arg=ARGUMENTS,
            **more,
        )
        # What is set for one engine would hold for each that is started after it, ports included.
        self._environment = patch.dict(os.environ)
        self._environment.start()
        self.lines = []
        try:
            self.built = build(settings, "w", 1, self.lines.append)
        except BaseException:
            self._environment.stop()
            raise
        self.engine = self.built.engine
        self.engine.start(_Nobody())

    @asynccontextmanager
    async def driven(self):
        """With an empty cache."""
        loop, driver = asyncio.get_running_loop(), Driver(self.engine)
        forgotten = asyncio.Event()
        core = self.engine._loop
        core.post(lambda c: c.reset_cache(lambda: loop.call_soon_threadsafe(forgotten.set)))
        async with asyncio.timeout(30):
            await forgotten.wait()
        core.post(lambda c: c.serve(driver))
        yield driver
        core.post(lambda c: c.serve(_Nobody()))
        if driver.failure is not None:
            raise driver.failure

    def close(self) -> None:
        asyncio.run(self.engine.close())
        self._environment.stop()


class _Nobody:
    def begin_step(self, predicted_ms) -> None: ...

    def step(self, output) -> None: ...

    def ended(self) -> None: ...


GREEDY = {"sampling": wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0)}


def place(driver, ids, **more):
    return driver.place(list(ids), **{**GREEDY, **more})


async def ended(attempt, name="finished"):
    async with asyncio.timeout(120):
        while attempt.end is None and not attempt.refused:
            attempt.changed.clear()
            await attempt.changed.wait()
    assert not attempt.refused, attempt.opening
    assert attempt.end.WhichOneof("end") == name, attempt.end
    return attempt
