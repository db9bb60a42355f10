"""What runs on a server, and for how long it may be silent."""

from __future__ import annotations

from kvmesh.engine.vllm.attempts import Phase
from kvmesh.engine.vllm.state import State

PATIENCE_MS = 7_500.0
"""Predicted for a step in which nothing of ours decodes: its prompts may be behind those of
other clients. Routers take an engine to be stuck after eight times as long."""


class RemoteState(State):
    """Attempts, steps and KV use."""

    def begin_step(self, now: float) -> float | None:
        """As State's, with patience where all that is ours waits."""
        told = super().begin_step(now)
        if told is None or any(a.phase is Phase.DECODING for a in self.by_request.values()):
            return told
        self._predicted_ms = max(told, PATIENCE_MS)
        return self._predicted_ms
