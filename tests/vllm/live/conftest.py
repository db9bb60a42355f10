"""vLLM itself: one engine in this process, and a cluster with prefill and decode.

An engine takes 3 GB and up to a minute to start, so there are few, and never more than two.
"""

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Modules of the other tests: clusters, the harness of engines, and the reference.
sys.path[:0] = [str(ROOT / name) for name in ("vllm/live", "e2e", "engine", "equality")]

from engine_harness import Driver  # noqa: E402
from workers import ARGUMENTS, MODEL, POOL_TOKENS, two_workers  # noqa: E402

from kvmesh import models  # noqa: E402


@pytest.fixture(scope="session")
def folder():
    return models.pull(MODEL)


@pytest.fixture(scope="session")
def reference(folder):
    import torch
    from transformers_reference import Reference

    torch.set_num_threads(1)
    return Reference(folder)


class Engine:
    """An engine that lives as long as the tests of a module; each has its own driver."""

    def __init__(self) -> None:
        from kvmesh.engine.vllm.served import build
        from kvmesh.worker.settings import WorkerSettings

        settings = WorkerSettings(
            engine="vllm",
            model=MODEL,
            kv_pool_tokens=POOL_TOKENS,
            log_level="warn",
            vllm_arg=ARGUMENTS,
        )
        self.lines = []
        self.built = build(settings, "w", 1, self.lines.append)
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


class _Nobody:
    def begin_step(self, predicted_ms) -> None: ...

    def step(self, output) -> None: ...

    def ended(self) -> None: ...


@pytest.fixture(scope="module")
def one():
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
async def driver(one):
    async with one.driven() as driver:
        yield driver


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with two_workers(tmp_path_factory.mktemp("pair")) as cluster:
        yield cluster


@pytest.fixture(scope="session", autouse=True)
def _offline():
    # The model is here; nothing is looked up.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
