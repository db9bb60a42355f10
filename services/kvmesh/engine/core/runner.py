"""What the engine core asks of a model: run one batch of token slices.

A runner computes. It knows no requests, queues, routers or rooms; the core
knows no tensors. `torch` has one that multiplies matrices, `sim` one that
takes the time of a real one.

`Runner` is what every engine has. `ColumnRunner` is for one whose own time a
step is so short that objects a stream would count: it takes the decoding
streams as columns that the core keeps from step to step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh._router import KvPool, SimStreams


@dataclass(slots=True)
class SampleSpec:
    """How the token after a slice is drawn (docs/architecture.md, Sampling)."""

    sampling: wire.ResolvedSampling
    prompt_ids: Sequence[int]
    """Whole prompt: repetition penalty."""
    output_ids: Sequence[int]
    """Output so far: penalties; its length is the seed position."""
    logprobs: int | None
    """Alternatives to report; None for none."""
    banned_ids: Sequence[int] = ()
    """Ids that must not be drawn now: ends of text before min_tokens."""


@dataclass(slots=True)
class Slice:
    """Consecutive tokens of one sequence to be computed in a step.

    Decode is a slice of one token; a chunk of prefill a slice of many.
    """

    ids: npt.NDArray[np.uint32]
    """[n] token ids to compute."""
    start: int
    """Position of ids[0]; everything before lies in the blocks."""
    blocks: npt.NDArray[np.uint32]
    """[ceil((start + n) / block_tokens)] pool slots of the sequence."""
    sample: SampleSpec | None
    """Draw a token after the last id; None within a prompt."""
    tag: int = 0
    """Opaque u64; sim's mode where tokens depend on the attempt."""
    key: int = 0
    """The sequence: never used twice. What is remembered by it may be forgotten
    at any time; the blocks are the truth."""


@dataclass(slots=True)
class DecodeRows:
    """Decoding streams by columns: each computes one token and draws the next.

    The same object comes every step while nobody joins or leaves; then
    `composition` changes and the columns are new. Row i is as a `Slice` of one
    token.
    """

    composition: int
    keys: list[int]
    """`Slice.key` a row."""
    tags: list[int]
    """`Slice.tag` a row."""
    firsts: npt.NDArray[np.int64]
    """[rows] positions of the first step of this composition."""
    tables: npt.NDArray[np.uint32]
    """[rows, width] pool slots; only those up to the position mean something."""
    ids: bytes
    """[rows] tokens to compute, packed as u32; everything before lies in the blocks."""
    context: int
    """Sum of the context lengths, these tokens included."""
    steps: int = 0
    """Steps made in this composition: positions are `firsts + steps`."""


@dataclass(slots=True)
class Sampled:
    """The token drawn after a slice."""

    token_id: int
    logprobs: inference.TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class PacedSteps:
    """Steps of decoding streams whose time only passes."""

    streams: SimStreams
    takes_s: tuple[float, float]
    """Seconds of a step, and besides for each token of context."""


class Runner(Protocol):
    """Runs batches over a KV pool. Used by one thread at a time."""

    @property
    def block_tokens(self) -> int:
        """KV block size in tokens; a multiple of 16."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: all layers, K and V (KvCompatibility.format)."""

    @property
    def layers(self) -> int:
        """Pauses that `forward` offers."""

    def compatibility(self) -> wire.KvCompatibility:
        """What transfer partners must agree on."""

    def bind(self, pool: KvPool) -> None:
        """Takes the pool whose slots `Slice.blocks` name. Called once."""

    def forward(self, batch: Sequence[Slice]) -> Generator[None, None, list[Sampled | None]]:
        """Computes a batch, pausing after each layer.

        Between two pauses another batch may be run to its end; the result of
        this one stays equal to the bit. Dropping the generator abandons the
        batch. Returns one entry a slice, None where `sample` was None.
        """

    def close(self) -> None:
        """Frees what it holds. Idempotent."""


class ColumnRunner(Runner, Protocol):
    """A runner that also takes decoding streams as columns.

    The core gives it streams whose sampling asks for nothing but the token:
    no log-probabilities, no banned ids. All others come as slices.
    """

    def forward_columns(
        self, batch: Sequence[Slice], rows: DecodeRows
    ) -> Generator[None, None, tuple[list[Sampled | None], bytes]]:
        """As `forward`, with the tokens drawn for the rows, packed, as second result."""

    def paced(self, rows: DecodeRows) -> PacedSteps | None:
        """Steps of these rows for `DecodeLoop`; None: they take no time, or not this one."""

    def decode_columns(self, rows: DecodeRows) -> bytes:
        """A step of decoding streams alone, which nothing stops: the tokens drawn, packed."""
