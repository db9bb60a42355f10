"""Times a few steps at the start, so that the first prediction is no guess.

vLLM is given ordinary requests: a first one, not counted, wakes it up (on a CPU
it takes seconds to lay weights out), then prompts of some lengths and a batch.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmesh.engine.contract import AttemptId, Placement, RouterStep, Stage, StepOutput, StepSample
from kvmesh.engine.core.step_model import StepLoad, fit
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh.engine.vllm.loop import CoreLoop
    from kvmesh.engine.vllm.state import Geometry

BUDGET_S = 6.0
"""No further request is begun after this long."""
_TIMEOUT_S = 600.0
"""The first step of a large model compiles it."""
_PROMPTS = (32, 128, 512)
_BATCH = 8
_TOKENS = 3
_SALT = "kvmesh warm-up"


class WarmUpError(Exception):
    """A first request did not come through."""


class WarmUp:
    """The sink of the first requests."""

    def __init__(
        self,
        geometry: Geometry,
        salt: str = _SALT,
        stop_token_ids: Sequence[int] = (),
        first: int = 1,
    ) -> None:
        """`salt` keeps what is cached of it apart; without one `first`, the number of the first
        prompt, has to be one that was not used before. `stop_token_ids` end a request."""
        self._geometry = geometry
        self._salt = salt
        self._stop_token_ids = stop_token_ids
        self._numbers = itertools.count(first)
        self._open: set[bytes] = set()
        self._failed = ""
        self._done = threading.Event()
        self._samples: list[StepSample] = []

    # Called by the engine's thread.
    def begin_step(self, predicted_ms: float) -> None:
        """Nothing."""

    def step(self, output: StepOutput) -> None:
        """Takes the ends."""
        for step in output.routers.values():
            self._look(step)

    def _look(self, step: RouterStep) -> None:
        for opening in step.openings:
            if opening.HasField("refused"):
                self._end(opening.generation, opening.refused.message)
        for end in step.ends:
            self._end(end.generation, "" if end.HasField("finished") else f"{end}")

    def _end(self, generation: bytes, problem: str) -> None:
        self._failed = self._failed or problem
        self._open.discard(generation)
        if not self._open:
            self._done.set()

    def ended(self) -> None:
        """The engine has gone."""
        self._failed = self._failed or "the engine core has ended"
        self._done.set()

    # Called by the worker's thread.
    def measure(self, loop: CoreLoop) -> wire.StepModel:
        """Runs the requests and fits the model. Raises WarmUpError."""
        self._run(loop, [8], 2)
        loop.on_sample = self._samples.append
        begun = time.monotonic()
        most = self._geometry.context_length - _TOKENS - 1
        runs = [[min(most, tokens)] for tokens in _PROMPTS]
        runs.insert(1, [min(most, 16)] * _BATCH)
        for prompts in runs:
            if time.monotonic() - begun > BUDGET_S:
                break
            self._run(loop, prompts, _TOKENS)
        loop.on_sample = lambda sample: None
        forgotten = threading.Event()
        loop.post(lambda core: core.reset_cache(forgotten.set))
        if not forgotten.wait(_TIMEOUT_S):
            raise WarmUpError("vLLM does not answer")
        return self._fitted()

    def _run(self, loop: CoreLoop, prompts: list[int], tokens: int) -> None:
        placements = [self._placement(length, tokens) for length in prompts]
        self._done.clear()
        self._open = {placement.id.generation for placement in placements}
        for placement in placements:
            loop.post(lambda core, placement=placement: core.submit(placement))  # type: ignore[misc]
        if not self._done.wait(_TIMEOUT_S):
            raise WarmUpError(f"a first request took more than {_TIMEOUT_S:g} s")
        if self._failed:
            raise WarmUpError(self._failed)

    def _placement(self, length: int, tokens: int) -> Placement:
        number = next(self._numbers)
        # Prompts that share no block.
        prompt = random.Random(number).choices(range(self._geometry.vocabulary_size), k=length)
        continuation = wire.Continuation(
            prompt_ids=prompt,
            max_tokens=tokens,
            cache_salt=self._salt,
            stop_token_ids=self._stop_token_ids,
            sampling=wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0),
        )
        return Placement(
            AttemptId(number.to_bytes(16, "big"), 1, 1), "", Stage.WHOLE, continuation,
            time.monotonic(),
        )  # fmt: skip

    def _fitted(self) -> wire.StepModel:
        if not self._samples:
            raise WarmUpError("vLLM told of no step (enable_logging_iteration_details)")
        loads = [
            StepLoad(s.prefill_tokens, s.prefill_context, s.decode_batch, s.decode_context)
            for s in self._samples
        ]
        return fit(loads, [sample.duration_us / 1000 for sample in self._samples])
