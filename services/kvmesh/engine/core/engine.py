"""The engine that a worker holds: `contract.Engine` over a runner.

Everything here may be called from any thread and only posts to, or reads
from, the engine thread (loop.py).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvmesh._router import ClusterToken, KvPool, PeerTls, TransferNode
from kvmesh.engine.contract import AttemptId, CacheChange, EngineLoad, OutputSink, Placement
from kvmesh.engine.core.blocks import BlockPool
from kvmesh.engine.core.chain import Chain
from kvmesh.engine.core.loop import EngineLoop
from kvmesh.engine.core.runner import Runner
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.engine.core.snapshot import snapshot_parts
from kvmesh.engine.core.steps import Clock
from kvmesh.engine.core.warm_up import measure
from kvmesh.v1 import worker_pb2 as wire

_PART_BYTES = 32 << 20
"""Of memory that is taken at once: under 100 ms, between which signals are seen."""

_log = logging.getLogger(__name__)


class MonotonicClock:
    """Time as it passes."""

    now = staticmethod(time.monotonic)
    """Now, as `Placement.received_at`."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How the transfer node listens."""

    listen: str = "127.0.0.1:0"
    """Address; port 0 takes a free one."""
    advertise: str = ""
    """Host told to peers where `listen` is a wildcard."""
    shared_memory: bool = True
    """Copy from mappings of peers on this host."""
    lease_s: float = 10.0
    """Lease of a transfer, seconds."""
    offer_timeout_s: float = 2.0
    """How long a pull waits for its offer, seconds."""
    token: ClusterToken | None = None
    """What peers show each other; None: nothing."""
    tls: PeerTls | None = None
    """TLS with all peers; None: with none."""


class CoreEngine:
    """A runner with queue, batches, prefix cache and hand-offs around it."""

    def __init__(
        self,
        runner: Runner,
        settings: CoreSettings,
        capabilities: wire.Capabilities,
        transfer: TransferSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`capabilities` says what the runner can do; the rest is filled in.

        `transfer` None: no hand-offs. Raises OSError where the pool cannot be
        mapped or the transfer port cannot be bound.
        """
        self._runner = runner
        self._settings = settings
        self._memory = KvPool(
            settings.pool_blocks, runner.block_bytes, huge_pages=settings.huge_pages
        )
        runner.bind(self._memory)
        compatibility = runner.compatibility()
        chain = Chain(compatibility.model_digest, settings.adapters)
        self._pool = BlockPool(self._memory, runner.block_tokens, chain.hashes, chain.root)
        self._node: TransferNode | None = None
        if transfer is not None:
            self._node = TransferNode(
                self._memory,
                worker_id=settings.worker_id,
                incarnation=settings.incarnation,
                compatibility=compatibility.SerializeToString(),
                block_tokens=runner.block_tokens,
                listen=transfer.listen,
                advertise=transfer.advertise,
                shared_memory=transfer.shared_memory,
                lease_s=transfer.lease_s,
                offer_timeout_s=transfer.offer_timeout_s,
                token=transfer.token,
                tls=transfer.tls,
            )
        self._clock = clock or MonotonicClock()
        self._model = wire.StepModel()
        self._capabilities = self._complete(capabilities, compatibility)
        self._loop = EngineLoop(
            runner, self._pool, settings, self._model, self._node, self._clock,
            capabilities.max_logprobs,
        )  # fmt: skip
        self._thread: threading.Thread | None = None
        self._closed = False

    def _complete(
        self, given: wire.Capabilities, compatibility: wire.KvCompatibility
    ) -> wire.Capabilities:
        behaviour, complete = self._settings.behaviour, wire.Capabilities()
        complete.CopyFrom(given)
        complete.streamed_hand_off = behaviour.streamed_hand_off and self._node is not None
        complete.engine_connector = behaviour.engine_connector if self._node is not None else ""
        complete.prefill_emits_first_token = behaviour.prefill_emits_first_token
        complete.layer_preemption = behaviour.layer_preemption
        complete.prefix_pull = self._node is not None
        complete.cache_events = True
        complete.block_tokens = self._runner.block_tokens
        complete.pool_blocks = self._settings.pool_blocks
        complete.block_bytes = self._runner.block_bytes
        complete.hash_scheme = Chain.SCHEME
        complete.kv.CopyFrom(compatibility)
        complete.max_batch = self._settings.max_batch
        return complete

    # -- life --------------------------------------------------------------

    def start(self, sink: OutputSink) -> None:
        """Times a few steps where the step model is not known, then begins to work.

        The one call that takes time: seconds with a slow runner.
        """
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        known = self._settings.step_model
        self._model.CopyFrom(
            measure(self._runner, self._pool, self._clock, self._settings.context_length)
            if known is None
            else known
        )
        self._loop.sink = sink
        self._thread = threading.Thread(target=self._loop.run, name="engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Ends all attempts and frees everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        elif self._node is not None:
            self._node.close()
        self._runner.close()
        _log.info("%s", self.describe_memory())
        self._memory.close()

    # -- work --------------------------------------------------------------

    def submit(self, placement: Placement) -> None:
        """Takes a placement; its `Opening` goes to the sink."""
        self._loop.post(lambda loop: loop.submit(placement))

    def hand_over(
        self, attempt: AttemptId, next_attempt: int, hand_off: wire.HandOff, border: int
    ) -> None:
        """Passes a running stream on while it decodes (hand_over.py).

        Where it cannot pass, the receiver, which reserved and pulls already, is told
        at once, and its attempt ends as `transfer_failed`; no token changes.
        """
        self._loop.post(lambda loop: loop.hand_overs.begin(attempt, border, hand_off))

    def cancel(self, attempts: Iterable[AttemptId]) -> None:
        """Ends attempts at the next layer or step border."""
        ended = list(attempts)
        if ended:
            self._loop.post(lambda loop: loop.cancel(ended))

    def snapshot(self) -> Iterator[Sequence[CacheChange]]:
        """The cache's content, hottest first."""
        return snapshot_parts(self._pool)

    # -- state -------------------------------------------------------------

    def load(self) -> EngineLoad:
        """State now."""
        return self._loop.load()

    def residue(self) -> wire.Residue:
        """What is held; all zero when nothing runs."""
        hand_offs = self._loop.hand_offs
        return wire.Residue(
            requests=len(self._loop.sequences),
            transfers=hand_offs.count if hand_offs is not None else 0,
            held_blocks=self._pool.held,
        )

    def capabilities(self) -> wire.Capabilities:
        """What it can do."""
        return self._capabilities

    def step_model(self) -> wire.StepModel:
        """Predicted step times."""
        return self._model

    def take_memory(self, progress: Callable[[int, int], None]) -> None:
        """Takes all memory of the KV pool before it is used: it holds up no stream later.

        Blocks; may be interrupted between two parts. `progress`: bytes done, bytes in all.
        Raises OSError where the kernel has no memory.
        """
        memory = self._memory
        part = max(1, _PART_BYTES // memory.block_bytes)
        for first in range(0, memory.blocks, part):
            progress(first * memory.block_bytes, memory.nbytes)
            memory.populate(first, min(part, memory.blocks - first))

    def describe_memory(self) -> str:
        """One line on the KV pool: its size, and how much of it is in huge pages by now.

        A first piece of memory is taken at the start whatever the settings say, so that it
        is known then whether the kernel gives huge pages.
        """
        huge, refused, why = self._memory.huge_use()
        pages = f"{huge >> 20} MiB in huge pages so far"
        if refused:
            pages += f", {refused >> 20} MiB refused by the kernel ({why})"
        elif not huge:
            pages = "in small pages"
        return f"KV pool: {self._memory.nbytes / (1 << 20):.0f} MiB, {pages}"

    @property
    def transfer_address(self) -> str:
        """Address of the transfer node; empty: none."""
        return self._node.address if self._node is not None else ""
