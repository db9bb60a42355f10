"""Settings of the engine core. Every bound has a name and a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.engine.contract import ALONE_TOKENS, ROOM_TOKENS
from kvmesh.v1 import worker_pb2 as wire


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """How the core runs requests over a runner."""

    pool_blocks: int
    """KV blocks in the pool."""
    context_length: int
    """Most tokens of a sequence, prompt and output together."""
    vocabulary_size: int = 0
    """Number of token ids; a prompt with others is refused. 0: not checked."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Digests of the adapters by name, as in `ModelRecord.adapters`."""
    worker_id: str = "worker"
    """Name of this worker, told to transfer partners."""
    incarnation: int = 1
    """Random number of this process start."""
    max_batch: int = 256
    """Most requests in a step."""
    decode_margin_tokens: int = ROOM_TOKENS
    """Tokens of output that room is reserved for besides the prompt (DESIGN 4)."""
    chunk_tokens: int = 0
    """Tokens of prompts in a step, whatever they take. 0: as many as fit the
    targets in milliseconds."""
    preemption_target_ms: float = 100.0
    """Most that prompts may add to a step that nothing can stop, milliseconds: one
    with decoding streams, and any of an engine that stops only between chunks."""
    alone_tokens: int = ALONE_TOKENS
    """New tokens after which a suspect shares its steps again (DESIGN 5)."""
    huge_pages: bool = True
    """Ask the kernel for huge pages for the pool."""
    output_behaviour: OutputBehaviour | None = None
    """How hand-offs behave; None: streamed, as kvmesh's own engines do."""
    step_model: wire.StepModel | None = None
    """Known step times; None: measured at start."""

    @property
    def behaviour(self) -> OutputBehaviour:
        """How hand-offs behave."""
        return self.output_behaviour or OutputBehaviour()


@dataclass(frozen=True, slots=True)
class OutputBehaviour:
    """What differs between engine families (wire: Capabilities)."""

    streamed_hand_off: bool = True
    """Blocks flow while prefill computes; else known only when it ends."""
    engine_connector: str = ""
    """Name of the on_finish connector; empty: none."""
    prefill_emits_first_token: bool = True
    """Prefill draws the first token; else decode does."""
    layer_preemption: bool = True
    """A chunk can stop between layers."""
