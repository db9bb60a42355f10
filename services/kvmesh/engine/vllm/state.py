"""What runs in a vLLM engine, and how loaded it is.

Used by the engine's thread alone, but for what says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvmesh.engine.contract import AttemptId, EngineLoad, KvRoom, LoadShare, StepSample
from kvmesh.engine.core.step_model import Pace, StepLoad, predict_ms
from kvmesh.engine.vllm.attempts import Attempt, Phase, shares
from kvmesh.engine.vllm.border import CoreOutputs, CoreStats
from kvmesh.v1 import worker_pb2 as wire


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the engine."""

    pool_blocks: int
    block_tokens: int
    step_tokens: int
    """Most tokens of a step."""
    context_length: int
    vocabulary_size: int

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)


class State:
    """Attempts, steps and KV use."""

    def __init__(self, geometry: Geometry, model: wire.StepModel) -> None:
        """`model` is filled in by the warm-up."""
        self.geometry = geometry
        self.attempts: dict[AttemptId, Attempt] = {}
        self.by_request: dict[str, Attempt] = {}
        """Those that vLLM has."""
        self.aborting: set[str] = set()
        """Requests of which vLLM has not said yet that they are gone."""
        self._model = model
        self._pace = Pace()
        self._usage = 0.0
        self._step = 0
        self._begun: float | None = None
        """When the running step began; None: none runs."""
        self._predicted_ms = 0.0
        self._last_end = 0.0
        self._load = EngineLoad(kv=KvRoom(free=geometry.pool_blocks))

    # -- steps -------------------------------------------------------------

    @property
    def step(self) -> int:
        """Number of the running step, or of the last one."""
        return self._step

    @property
    def busy(self) -> bool:
        """Whether vLLM has requests of ours."""
        return bool(self.by_request)

    def next_load(self) -> StepLoad:
        """What the next step is expected to hold."""
        load = StepLoad()
        for attempt in self.by_request.values():
            if attempt.phase is Phase.DECODING:
                load.decode_batch += 1
                load.decode_context += attempt.length
        room = max(1, self.geometry.step_tokens - load.decode_batch)
        for attempt in self._prompts():
            tokens = min(room, attempt.left)
            load.add_chunk(attempt.computed, tokens)
            room -= tokens
            if not room:
                break
        return load

    def _prompts(self) -> list[Attempt]:
        waiting = (a for a in self.by_request.values() if a.phase is Phase.WAITING)
        return sorted(waiting, key=lambda attempt: (attempt.priority, attempt.received_at))

    def begin_step(self, now: float) -> float | None:
        """A step begins, if there is work and none runs; what to tell of its length, ms. None:
        none begins."""
        if not self.busy or self._begun is not None:
            return None
        self._step += 1
        self._begun = now
        self._predicted_ms = self._pace.told_ms(predict_ms(self._model, self.next_load()))
        return self._predicted_ms

    def stand(self) -> None:
        """No step runs."""
        self._begun = None

    def end_step(self, outputs: CoreOutputs, decoded: Sequence[int]) -> StepSample | None:
        """A step has ended, in which streams of these lengths decoded. None: it computed
        nothing."""
        stats = outputs.scheduler_stats
        details = stats.iteration_details if stats is not None else None
        if (
            stats is None
            or details is None
            or not (details.num_ctx_tokens or details.num_generation_requests)
        ):
            return None
        self._usage = stats.kv_cache_usage
        load = self._took(details.num_ctx_tokens, details.num_generation_requests, decoded)
        # Where vLLM has steps in flight at the same time, its own figure is the wait for one.
        took_ms = details.elapsed_ms
        if self._begun is not None and self._last_end:
            between_s = outputs.timestamp - max(self._last_end, self._begun)
            took_ms = max(took_ms, between_s * 1000)
        self._last_end, self._begun = outputs.timestamp, None
        self._pace.took(predict_ms(self._model, load), took_ms)
        return StepSample(
            load.prefill_tokens, load.prefill_context, load.decode_batch, load.decode_context,
            max(1, int(took_ms * 1000)),
        )  # fmt: skip

    def _took(self, prompt_tokens: int, decoding: int, decoded: Sequence[int]) -> StepLoad:
        """What the step held, and how far its prompts are."""
        load = StepLoad(decode_batch=decoding)
        for attempt in self._prompts():
            tokens = min(prompt_tokens, attempt.left)
            if not tokens:
                break
            load.add_chunk(attempt.computed, tokens)
            # The last token is computed when the first one comes.
            attempt.computed = min(attempt.length - 1, attempt.computed + tokens)
            prompt_tokens -= tokens
        # vLLM found less in its cache than was told, or computes one anew.
        load.add_chunk(0, prompt_tokens)
        if decoded:
            load.decode_context = decoding * sum(decoded) // len(decoded)
        return load

    # -- load --------------------------------------------------------------

    def count(self, cached_blocks: int) -> bool:
        """Makes the newest load. True: it differs from the one before."""
        before = self._load
        room = self._room(cached_blocks)
        self._load = EngineLoad(room, shares(self.attempts.values()), self._step)
        return room != before.kv or self._load.shares != before.shares

    def _room(self, cached_blocks: int) -> KvRoom:
        pool = self.geometry.pool_blocks
        used = min(pool, round(self._usage * pool))
        own = sum(
            self.geometry.blocks_for(a.computed if a.phase is Phase.WAITING else a.length)
            for a in self.by_request.values()
        )
        # What nobody's request holds waits for another worker to take it.
        running = min(used, own)
        evictable = min(max(0, cached_blocks - used), pool - used)
        return KvRoom(pool - used - evictable, evictable, running, used - running, 0)

    def load(self) -> EngineLoad:
        """Newest, with the age of the running step. From any thread."""
        begun = self._begun
        age = 0.0 if begun is None else (time.monotonic() - begun) * 1000
        predicted = 0.0 if begun is None else self._predicted_ms
        return replace(self._load, step_age_ms=age, step_predicted_ms=predicted)

    def shares(self) -> dict[str, LoadShare]:
        """Work by router session, as last counted."""
        return self._load.shares

    def saw(self, stats: CoreStats) -> bool:
        """KV use between steps. True: it has changed."""
        before, self._usage = self._usage, stats.kv_cache_usage
        return self._usage != before

    def residue(self) -> wire.Residue:
        """What is held. From any thread."""
        kv = self._load.kv
        return wire.Residue(
            requests=len(self.attempts) + len(self.aborting),
            held_blocks=kv.running + kv.pinned + kv.reserved,
        )
