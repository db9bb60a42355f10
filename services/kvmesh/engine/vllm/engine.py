"""vLLM as an engine: `contract.Engine` over its engine core.

Everything here may be called from any thread and only posts to, or reads from,
the thread of loop.py.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kvmesh.engine.contract import AttemptId, CacheChange, EngineLoad, OutputSink, Placement
from kvmesh.engine.vllm.cache import VllmCache
from kvmesh.engine.vllm.loop import CoreLoop
from kvmesh.engine.vllm.state import State
from kvmesh.engine.vllm.warm_up import WarmUp, WarmUpError
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import SettingError

_GUARD = Path(__file__).with_name("guard.py")
_MARK = "KVMESH_ENGINE_OF"
_GUARD_S = 10.0


class Guard:
    """Ends the core's processes when this one has gone."""

    def __init__(self, folder: Path) -> None:
        """`folder` is removed with it."""
        mark = secrets.token_hex(16)
        # What is started from now on inherits it.
        os.environ[_MARK] = mark
        # A process that renames itself keeps its environment readable.
        os.environ.setdefault("SPT_NOENV", "1")
        self._process = subprocess.Popen(
            [sys.executable, "-SE", str(_GUARD), f"{_MARK}={mark}", str(folder)],
            stdin=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != _MARK},
            start_new_session=True,
        )

    def close(self) -> None:
        """Ends what is left, and the guard."""
        os.environ.pop(_MARK, None)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(_GUARD_S)


class VllmEngine:
    """One vLLM engine."""

    def __init__(
        self,
        loop: CoreLoop,
        state: State,
        cache: VllmCache,
        capabilities: wire.Capabilities,
        model: wire.StepModel,
        guard: Guard | None = None,
    ) -> None:
        """Of a core that has started. `model` is filled in by `start`; `state` has it, too."""
        self._loop = loop
        self._state = state
        self._cache = cache
        self._capabilities = capabilities
        self._model = model
        self._guard = guard
        self._closed = False

    # -- life --------------------------------------------------------------

    def start(self, sink: OutputSink) -> None:
        """Times a few steps, then begins to work. Takes seconds. Raises SettingError."""
        warm_up = WarmUp(self._state.geometry)
        self._loop.sink = warm_up
        if self._loop.over:
            # Whoever heard of it then, it was not this sink.
            raise SettingError("vLLM's engine core has ended since it started")
        try:
            self._model.CopyFrom(warm_up.measure(self._loop))
        except WarmUpError as error:
            raise SettingError(f"vLLM started and computes nothing: {error}") from error
        self._loop.post(lambda core: core.serve(sink))

    async def close(self) -> None:
        """Ends all attempts and the core. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._loop.stop)
        if self._guard is not None:
            await asyncio.to_thread(self._guard.close)

    # -- work --------------------------------------------------------------

    def submit(self, placement: Placement) -> None:
        """Takes a placement; its `Opening` goes to the sink."""
        self._loop.post(lambda core: core.submit(placement))

    def hand_over(
        self, attempt: AttemptId, next_attempt: int, hand_off: wire.HandOff, border: int
    ) -> None:
        """Nothing: a running stream finishes where it is, and there is no mesh transfer."""

    def cancel(self, attempts: Iterable[AttemptId]) -> None:
        """Ends attempts at the next step border."""
        ended = list(attempts)
        if ended:
            self._loop.post(lambda core: core.cancel(ended))

    def snapshot(self) -> Iterator[Sequence[CacheChange]]:
        """The cache's content as vLLM's events told it, newest first."""
        return self._cache.snapshot()

    # -- state -------------------------------------------------------------

    def load(self) -> EngineLoad:
        """State now."""
        return self._state.load()

    def residue(self) -> wire.Residue:
        """What is held; all zero when nothing runs."""
        return self._state.residue()

    def capabilities(self) -> wire.Capabilities:
        """What it can do."""
        return self._capabilities

    def step_model(self) -> wire.StepModel:
        """Predicted step times, fitted by warm-up."""
        return self._model

    @property
    def transfer_address(self) -> str:
        """None: connectors of vLLM move KV by addresses of their own."""
        return ""
