"""Steps of decoding streams alone, as one launch.

A step of a small model is hundreds of kernels that each take less time than their launch.
A device that can keep what it was told (a CUDA graph) does all of them at a word. What was
kept has fixed shapes and fixed places: so batches are filled up to the next power of two in
rows and in blocks a row, and what differs from step to step lies in one tensor that the
kernels read. Filled-up rows attend to, and write into, a block that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.engine.torch.attention import attend_decode, row_bias
from kvmesh.engine.torch.model import LlamaModel
from kvmesh.engine.torch.paged_kv import KvShape
from kvmesh.engine.torch.plan import DecodeRows
from kvmesh.engine.torch.rope import Rope
from kvmesh.engine.torch.torch_kv import Mirror, store

_FEWEST_BLOCKS = 8
_MOST_ROWS = 128
_MOST_BLOCKS = 8_192
"""Rows times blocks a row: gathering K and V of a layer takes this many blocks of memory."""


Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Makes of a step one that does the same at a word, into the same result."""


def cuda_capture() -> Capture:
    """Keeps what a step launches; what comes back does it again, into the same result.

    All that it captures share one pool of memory: one runs at a time, and what one left is
    read before the next one runs.
    """
    memory = torch.cuda.graph_pool_handle()
    return lambda step: _captured(step, memory)


def _captured(step: Step, memory: Any) -> Step:
    # Libraries set themselves up in a first call, which may not be kept.
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    now = torch.cuda.current_stream()
    aside.wait_stream(now)
    with torch.cuda.stream(aside):
        step()
    now.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        result = step()

    def again() -> torch.Tensor:
        graph.replay()
        return result

    return again


@dataclass(frozen=True, slots=True)
class _Kept:
    """A step of one shape."""

    host: npt.NDArray[np.int64]
    """[rows, 2 + blocks]: id, length with the new token, slots. Pinned where that is known."""
    given: Callable[[], None]
    """Brings `host` to the device."""
    step: Step
    """[rows, hidden], the same tensor each time."""


class DecodeGraphs:
    """Runs batches whose slices have one token each.

    `mirror` has the pool's blocks on the device, and one more. A shape is
    captured when it is first met, which takes as long as a few steps.
    """

    def __init__(
        self,
        model: LlamaModel,
        rope: Rope,
        shape: KvShape,
        mirror: Mirror,
        capture: Capture,
    ) -> None:
        self._model = model
        self._rope = rope
        self._shape = shape
        self._mirror = mirror
        self._blocks = mirror.blocks
        self._capture = capture
        self._kept: dict[tuple[int, int], _Kept] = {}

    def fits(self, rows: DecodeRows) -> bool:
        """Whether the batch is small enough to be filled up."""
        count, width = _filled_up(rows)
        return count <= _MOST_ROWS and count * width <= _MOST_BLOCKS

    def run(self, ids: npt.NDArray[np.int64], rows: DecodeRows) -> torch.Tensor:
        """[n] ids to [n, hidden] after all layers; K and V are in the pool.

        The result is overwritten by the next call.
        """
        self._mirror.bring_rows(rows, self._shape.block_tokens)
        size = _filled_up(rows)
        kept = self._kept.get(size)
        if kept is None:
            kept = self._keep(*size, first=(ids, rows))
            self._kept[size] = kept
        else:
            self._fill(kept.host, ids, rows)
            kept.given()
        hidden = kept.step()[: len(ids)]
        self._mirror.take_rows(rows, self._shape.block_tokens)
        return hidden

    def _keep(
        self, count: int, width: int, first: tuple[npt.NDArray[np.int64], DecodeRows]
    ) -> _Kept:
        device = self._blocks.device
        pinned = torch.empty(
            (count, 2 + width), dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        host = pinned.numpy()
        self._fill(host, *first)
        given = pinned.to(device, copy=True)
        # The step is also made while it is captured: with rows that are there.
        step = self._capture(lambda: self._step(given))
        # Read before it is written again: a step ends with what it drew at the host.
        return _Kept(host, lambda: _copy(given, pinned), step)

    def _fill(
        self, host: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], rows: DecodeRows
    ) -> None:
        host[:, 0] = 0
        host[:, 1] = 1
        host[:, 2:] = len(self._blocks) - 1
        count = len(ids)
        host[:count, 0] = ids
        host[:count, 1] = rows.lengths
        ends = np.append(rows.begins[1:], len(rows.tables))
        for row, (begin, end) in enumerate(zip(rows.begins, ends, strict=True)):
            host[row, 2 : 2 + end - begin] = rows.tables[begin:end]

    def _step(self, given: torch.Tensor) -> torch.Tensor:
        kv = _Rows(self._shape, self._blocks, self._rope, given[:, 1], given[:, 2:])
        hidden = self._model.embed(given[:, 0])
        for index in range(self._model.layers):
            self._model.layer(index, hidden, kv)
        return hidden


class _Rows:
    """K and V of single rows, found on the device alone: see `BatchKv`."""

    def __init__(
        self,
        shape: KvShape,
        blocks: torch.Tensor,
        rope: Rope,
        lengths: torch.Tensor,
        tables: torch.Tensor,
    ) -> None:
        size = shape.block_tokens
        positions = lengths - 1
        self._shape = shape
        self._blocks = blocks
        self._tables = tables
        self._block = tables.gather(1, (positions // size)[:, None])[:, 0]
        self._place = positions % size
        self._angles = rope.angles(positions)
        self._bias = row_bias(lengths, tables.shape[1] * size)

    def write(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """As `BatchKv.write`."""
        return store(
            self._shape, self._blocks[:, layer], qkv, self._angles, self._block, self._place
        )

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """As `BatchKv.attend`."""
        return attend_decode(self._shape, self._blocks[:, layer], q, self._tables, self._bias)

    def finish(self) -> None:
        """Nothing: who runs the graph copies out."""


def _copy(to: torch.Tensor, pinned: torch.Tensor) -> None:
    to.copy_(pinned, non_blocking=True)


def _filled_up(rows: DecodeRows) -> tuple[int, int]:
    """Rows, and blocks a row, of the shape that a batch runs in."""
    widest = int(np.diff(rows.begins, append=len(rows.tables)).max())
    return _power_of_two(len(rows.lengths)), max(_power_of_two(widest), _FEWEST_BLOCKS)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
