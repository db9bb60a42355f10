"""A server as an engine."""

from __future__ import annotations

import secrets

from kvmesh.engine.contract import OutputSink
from kvmesh.engine.remote.server import LostError
from kvmesh.engine.vllm.engine import VllmEngine
from kvmesh.engine.vllm.warm_up import WarmUp, WarmUpError
from kvmesh.v1 import worker_pb2 as wire


class RemoteEngine(VllmEngine):
    """One server. What is not said here is as with vLLM in process."""

    ends_of_text: tuple[int, ...] = ()
    """Set before `start` where the server ends at these whatever a request says."""

    def start(self, sink: OutputSink) -> None:
        """Times a few requests, then begins to work. Takes seconds. Raises LostError."""
        # Unsalted: not every wire carries salts. No prompts begin like these, nor do those of
        # a life before this one, which the server may have kept.
        warm_up = WarmUp(
            self._state.geometry,
            salt="",
            stop_token_ids=self.ends_of_text,
            first=secrets.randbits(64),
        )
        self._loop.sink = warm_up
        if self._loop.over:
            raise LostError("the server has gone")
        try:
            self._model.CopyFrom(warm_up.measure(self._loop))
        except WarmUpError as error:
            raise LostError(f"the server answers no requests: {error}") from error
        self._loop.post(lambda core: core.serve(sink))

    def residue(self) -> wire.Residue:
        """What is held for routers; blocks of the server's other clients are not."""
        found = super().residue()
        found.held_blocks = self._state.load().kv.running
        return found
