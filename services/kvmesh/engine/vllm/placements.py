"""Placements checked and made what vLLM takes; every one is answered."""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvmesh._router import chain_values
from kvmesh.engine.contract import ROOM_TOKENS, AttemptId, Placement, Stage
from kvmesh.engine.core.blocks import UNIT_TOKENS
from kvmesh.engine.core.chain import Chain
from kvmesh.engine.vllm import border, hand_off
from kvmesh.engine.vllm.attempts import Attempt
from kvmesh.engine.vllm.border import CoreRequest, RequestMaker
from kvmesh.engine.vllm.cache import VllmCache
from kvmesh.engine.vllm.sampling import FIELDS, UnsupportedError, sampling_arguments
from kvmesh.engine.vllm.state import Geometry
from kvmesh.v1 import worker_pb2 as wire

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adapters:
    """LoRA adapters that the worker serves."""

    digests: Mapping[str, str] = field(default_factory=dict)
    """By name, as in ModelRecord.adapters."""
    requests: Mapping[str, object] = field(default_factory=dict)
    """vLLM's own, by name."""


@dataclass(slots=True)
class Prepared:
    """A placement, ready to go to vLLM or refused."""

    opening: wire.Opening
    attempt: Attempt | None = None
    """None: refused."""
    request: CoreRequest | None = None
    receives: bool = False
    """KV comes from another worker."""
    expires_at: float = math.inf
    """Until when that may be asked of vLLM; seconds, monotonic."""
    reserved_tokens: int = 0
    problem: str = ""
    path: str = ""
    """Of the field in GenerateRequest that is lacking; empty: none is."""
    release: CoreRequest | None = None
    """Of a refused one: what makes the other worker's blocks go."""


class Placements:
    """Makes requests of placements. Used by the engine's thread alone."""

    def __init__(
        self,
        geometry: Geometry,
        make: RequestMaker,
        cache: VllmCache,
        roots: Chain,
        *,
        connector: str,
        adapters: Adapters,
        max_logprobs: int,
        lease_ms: float = 0.0,
        seeded: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`roots`: of the model and its adapters. `connector`: its name; empty:
        there is none. `lease_ms`: how long it keeps a prompt's blocks; 0: not known.
        `seeded`: whether requests can have seeds. `clock`: what received_at is by."""
        self._geometry = geometry
        self._make = make
        self._cache = cache
        self._roots = roots
        self.connector = connector
        self.lease_ms = lease_ms
        self._seeded = seeded
        self._clock = clock
        self._adapters = adapters
        self._max_logprobs = max_logprobs
        self.waiting: dict[AttemptId, Prepared] = {}
        """Those that vLLM does not have yet."""

    def prepare(self, placement: Placement, running: Container[AttemptId]) -> Prepared:
        """Checks a placement against the engine, and makes its request."""
        prompt = _prompt(placement)
        opening = placement.id.opening(placement.stage)
        try:
            self._check(placement, prompt, running)
            params, expires_at = self._transfer_params(placement)
            request, attempt = self._request(placement, prompt, params)
        except UnsupportedError as error:
            refused = Prepared(opening, problem=str(error), path=error.field)
            if placement.stage is Stage.DECODE and placement.id not in running:
                refused.release = self._release(placement, prompt)
            return refused
        room = attempt.length + min(ROOM_TOKENS, placement.continuation.max_tokens)
        return Prepared(
            opening,
            attempt,
            request,
            receives=placement.stage is Stage.DECODE and params is not None,
            expires_at=expires_at,
            reserved_tokens=min(room, self._geometry.context_length),
        )

    def take(self, id: AttemptId) -> Prepared:
        """A waiting one, which goes to vLLM now: without its hand-off where that is too late.
        Nobody has renewed the lease while it waited, for however long it did."""
        prepared = self.waiting.pop(id)
        if prepared.receives and self._clock() > prepared.expires_at and prepared.request:
            # Nobody keeps the blocks for us any more: the prompt is computed here.
            _log.info("hand-off expired generation=%s", id.generation.hex())
            prepared.request.sampling_params.extra_args = None
            prepared.receives = False
        return prepared

    def _check(
        self, placement: Placement, prompt: list[int], running: Container[AttemptId]
    ) -> None:
        geometry = self._geometry
        limit = min(geometry.context_length, geometry.pool_blocks * geometry.block_tokens)
        if placement.id in running:
            raise UnsupportedError("", "the attempt is here already")
        if not prompt:
            raise UnsupportedError("", "the prompt is empty")
        if len(prompt) >= limit:
            raise UnsupportedError(
                "", f"{len(prompt)} tokens leave no room to go on: the limit is {limit}"
            )
        if max(prompt) >= geometry.vocabulary_size:
            raise UnsupportedError("", f"a token id is not under {geometry.vocabulary_size}")
        adapter = placement.continuation.adapter
        if adapter and adapter not in self._adapters.requests:
            raise UnsupportedError("model", f"this worker has no adapter {adapter!r}")

    def _transfer_params(self, placement: Placement) -> tuple[dict[str, Any] | None, float]:
        """What the connector is told with a request, if anything, and until when."""
        if placement.stage is Stage.WHOLE:
            return None, math.inf
        kind = placement.hand_off.WhichOneof("kind") if placement.hand_off else None
        if not self.connector:
            raise UnsupportedError("", "this worker has no KV connector (kv_transfer_config)")
        if kind == "mesh":
            raise UnsupportedError("", "hand-offs here are known on finish only")
        if placement.stage is Stage.PREFILL:
            return dict(hand_off.PREFILL), math.inf
        if placement.hand_off is None or kind is None:
            raise UnsupportedError("", "the hand-off is not set")
        engine = placement.hand_off.engine
        if engine.connector != self.connector:
            raise UnsupportedError(
                "", f"the hand-off is of {engine.connector!r}; here is {self.connector!r}"
            )
        try:
            found = hand_off.unpack(engine.payload)
        except hand_off.HandOffError as error:
            raise UnsupportedError("", str(error)) from error
        left_ms = found.left_ms(placement.continuation.waited_ms)
        return found.params, placement.received_at + left_ms / 1000

    def _request(
        self, placement: Placement, prompt: list[int], params: dict[str, Any] | None
    ) -> tuple[CoreRequest, Attempt]:
        continuation, geometry = placement.continuation, self._geometry
        sampling = sampling_arguments(
            continuation,
            room=geometry.context_length - len(prompt),
            max_logprobs=self._max_logprobs,
            seeded=self._seeded,
        )
        if params is not None:
            sampling["extra_args"] = {"kv_transfer_params": params}
        attempt = Attempt.of(placement, len(prompt), self._held(placement, prompt))
        try:
            request = self._make(
                attempt.request_id,
                prompt,
                sampling,
                arrival_time=time.time() - (time.monotonic() - placement.received_at),
                priority=attempt.priority,
                cache_salt=continuation.cache_salt,
                adapter=self._adapters.requests.get(continuation.adapter),
            )
        except border.RefusedError as error:
            path = FIELDS.get(error.parameter, "grammar" if "grammar" in sampling else "")
            raise UnsupportedError(path, f"vLLM refuses the request: {error}") from error
        if placement.stage is Stage.PREFILL:
            _prefill_only(request)
        return request, attempt

    def _held(self, placement: Placement, prompt: list[int]) -> int:
        """Tokens of the prompt that are cached here: a multiple of the block size."""
        size = self._geometry.block_tokens
        # The last token is always computed.
        blocks = (len(prompt) - 1) // size
        if not blocks or not len(self._cache):
            return 0
        continuation = placement.continuation
        root = self._roots.root(continuation.adapter, continuation.cache_salt)
        ids = array("I", prompt[: blocks * size]).tobytes()
        units = size // UNIT_TOKENS
        values = chain_values(root, ids)[units - 1 :: units]
        return self._cache.holds(values) * size

    def _release(self, placement: Placement, prompt: list[int]) -> CoreRequest | None:
        """A request that is aborted once it is accepted: so the connector tells the sender
        that nobody takes its blocks."""
        try:
            params, expires_at = self._transfer_params(placement)
            if params is None or self._clock() > expires_at:
                return None
            request = self._make(
                "refused-" + placement.id.generation.hex() + f"-{placement.id.attempt}",
                prompt[: self._geometry.context_length - 1],
                {"max_tokens": 1, "extra_args": {"kv_transfer_params": params}},
                arrival_time=time.time(),
                priority=0,
                cache_salt="",
                adapter=None,
            )
        except ValueError as error:
            _log.info("blocks of a refused hand-off stay until their lease ends: %s", error)
            return None
        request.abort_immediately = True
        return request


def _prompt(placement: Placement) -> list[int]:
    """Prompt and output so far: to vLLM all of it is prompt."""
    if placement.prompt_ids is None:
        ids = [*placement.continuation.prompt_ids]
    else:
        ids = [*memoryview(placement.prompt_ids).cast("I")]
    return [*ids, *placement.continuation.output_ids]


def _prefill_only(request: CoreRequest) -> None:
    """The request was checked as it is; of it only the prompt is computed here.

    vLLM draws a token at the end, of which nobody is told: decode draws it.
    """
    sampling = request.sampling_params
    sampling.temperature = 0.0
    sampling.seed = None
    sampling.max_tokens = 1
    sampling.min_tokens = 0
    sampling.logprobs = None
    sampling.structured_outputs = None
    sampling.stop_token_ids = []
    sampling._all_stop_token_ids = set()
