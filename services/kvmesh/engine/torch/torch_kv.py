"""K and V on any device and in any dtype, with torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.engine.torch.attention import attend_decode, attend_prefill, row_bias, slice_mask
from kvmesh.engine.torch.paged_kv import KvShape
from kvmesh.engine.torch.plan import DecodeRows, Plan, PrefillSlice
from kvmesh.engine.torch.rope import rotate

if TYPE_CHECKING:
    from kvmesh._router import KvPool

Slots = npt.NDArray[np.int64]


_STAGED_BYTES = 64 << 20
"""Most that one copy between pool and device brings, bytes."""


def store(
    shape: KvShape,
    blocks: torch.Tensor,
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    block: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """Rotates q and k, puts k and v in their places in one layer's blocks; returns q."""
    heads = qkv.view(qkv.shape[0], -1, shape.head_size)
    to_turn, v = torch.tensor_split(heads, (shape.heads + shape.kv_heads,), dim=1)
    q, k = torch.tensor_split(rotate(to_turn, *angles), (shape.heads,), dim=1)
    blocks[block, :, :, place] = torch.stack((k, v), dim=1)
    return q.flatten(1)


class TorchKv:
    """See `PagedKv`.

    On a device with memory of its own the blocks are mirrored there (`Mirror`). What is
    computed is copied out to the pool at the end of each batch, for transfers.
    """

    def __init__(
        self,
        shape: KvShape,
        pool: KvPool,
        dtype: torch.dtype,
        device: torch.device,
        mirror: bool | None = None,
    ) -> None:
        self._shape = shape
        self._blocks = shape.view(pool, dtype)
        self._mirror: Mirror | None = None
        if device.type != "cpu" if mirror is None else mirror:
            self._mirror = Mirror(pool, self._blocks, device)
            self._blocks = self._mirror.blocks

    @property
    def mirror(self) -> Mirror | None:
        """The blocks on a device with memory of its own."""
        return self._mirror

    def begin(self, plan: Plan) -> TorchBatch:
        """As `PagedKv.begin`; brings the blocks that the mirror does not have."""
        if self._mirror is not None:
            self._mirror.bring(*_blocks_of(plan.prefill, plan.decode, self._shape.block_tokens))
        return TorchBatch(self._shape, self._blocks, self._mirror, plan)


class Mirror:
    """The pool's blocks on a device.

    A mirrored block is known by the version of its slot: a block that was given out anew,
    or filled by a transfer, has another one and is copied in before it is read. Copies go
    through pinned memory: the pool's own cannot be pinned and huge pages asked for it, too.
    `blocks` has one more than the pool: for rows that fill a batch up.
    """

    def __init__(self, pool: KvPool, host: torch.Tensor, device: torch.device) -> None:
        sizes = (len(host) + 1, *host.shape[1:])
        self.blocks = torch.zeros(sizes, dtype=host.dtype, device=device)
        self._pool = pool
        self._host = host
        self._versions = np.full(host.shape[0], -1, dtype=np.int64)
        staged = max(1, min(host.shape[0], _STAGED_BYTES // host[0].nbytes))
        self._staging = torch.empty(
            (staged, *host.shape[1:]), dtype=host.dtype, pin_memory=device.type == "cuda"
        )

    def bring(self, read: Slots, written: Slots) -> None:
        """Copies in what is read and not here. What is only written will be here."""
        slots = np.unique(np.concatenate((read, written)))
        versions = np.array([self._pool.slot_version(int(slot)) for slot in slots], dtype=np.int64)
        stale = versions != self._versions[slots]
        for part in self._parts(np.intersect1d(slots[stale], read)):
            staged = self._staging[: len(part)]
            torch.index_select(self._host, 0, part, out=staged)
            self.blocks[part.to(self.blocks.device)] = staged.to(self.blocks.device)
        # Not before all are here: a batch whose copy failed is tried again.
        self._versions[slots] = versions

    def bring_rows(self, rows: DecodeRows, block_tokens: int) -> None:
        """Copies in what rows of one token each read."""
        self.bring(*_blocks_of((), rows, block_tokens))

    def take_rows(self, rows: DecodeRows, block_tokens: int) -> None:
        """Copies the new token of each row out to the pool."""
        places = (rows.lengths.astype(np.int64) - 1) % block_tokens
        self.take_tokens(rows.tables[_last_blocks(rows)].astype(np.int64), places)

    def take_blocks(self, slots: Slots) -> None:
        """Copies whole blocks out to the pool."""
        for part in self._parts(slots):
            staged = self._staging[: len(part)]
            staged.copy_(self.blocks[part.to(self.blocks.device)])
            self._host[part] = staged

    def take_tokens(self, slots: Slots, places: Slots) -> None:
        """Copies single tokens out to the pool: place i of block i."""
        block, place = torch.from_numpy(slots), torch.from_numpy(places)
        device = self.blocks.device
        new = self.blocks[block.to(device), :, :, :, place.to(device)]
        self._host[block, :, :, :, place] = new.cpu()

    def _parts(self, slots: Slots) -> Iterator[torch.Tensor]:
        for begin in range(0, len(slots), len(self._staging)):
            yield torch.from_numpy(slots[begin : begin + len(self._staging)])


def _blocks_of(
    prefill: Sequence[PrefillSlice], rows: DecodeRows | None, block_tokens: int
) -> tuple[Slots, Slots]:
    """Slots that a batch reads what others wrote of, and those that it writes."""
    read: list[Slots] = []
    written: list[Slots] = []
    for piece in prefill:
        read.append(piece.slots[: -(-piece.start // block_tokens)].astype(np.int64))
        written.append(piece.slots[piece.start // block_tokens :].astype(np.int64))
    if rows is not None:
        tables = rows.tables.astype(np.int64)
        last = _last_blocks(rows)
        fresh = rows.lengths % block_tokens == 1
        read.append(np.delete(tables, last[fresh]))
        written.append(tables[last])
    return np.concatenate(read), np.concatenate(written)


def _last_blocks(rows: DecodeRows) -> Slots:
    """Where in the tables each row's last block is."""
    last: Slots = np.append(rows.begins[1:], len(rows.tables)).astype(np.int64) - 1
    return last


class TorchBatch:
    """See `BatchKv`."""

    def __init__(
        self, shape: KvShape, blocks: torch.Tensor, mirror: Mirror | None, plan: Plan
    ) -> None:
        device = plan.slots.device
        self._shape = shape
        self._blocks = blocks
        self._mirror = mirror
        self._plan = plan
        self._block = plan.slots // shape.block_tokens
        self._place = plan.slots % shape.block_tokens
        # A CPU's kernel for slices needs no mask.
        masked = device.type != "cpu"
        self._masks = [
            slice_mask(shape, piece, device) if masked else None for piece in plan.prefill
        ]
        self._rows: torch.Tensor | None = None
        if plan.decode is not None:
            self._rows = torch.from_numpy(plan.decode.rows.astype(np.int64)).to(device)
            self._tables, self._bias = _padded(shape, plan.decode, device)

    def write(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """As `BatchKv.write`."""
        angles = (self._plan.cos, self._plan.sin)
        blocks = self._blocks[:, layer]
        return store(self._shape, blocks, qkv, angles, self._block, self._place)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """As `BatchKv.attend`."""
        blocks = self._blocks[:, layer]
        if self._rows is not None and not self._plan.prefill:
            return attend_decode(self._shape, blocks, q, self._tables, self._bias)
        out = torch.empty_like(q)
        for piece, mask in zip(self._plan.prefill, self._masks, strict=True):
            attend_prefill(self._shape, blocks, q, piece, mask, out)
        if self._rows is not None:
            single = q[self._rows]
            out[self._rows] = attend_decode(self._shape, blocks, single, self._tables, self._bias)
        return out

    def finish(self) -> None:
        """As `BatchKv.finish`; copies what was computed out to the pool."""
        if self._mirror is None:
            return
        size = self._shape.block_tokens
        if self._plan.prefill:
            pieces = [piece.slots[piece.start // size :] for piece in self._plan.prefill]
            self._mirror.take_blocks(np.concatenate(pieces).astype(np.int64))
        rows = self._plan.decode
        if rows is not None:
            self._mirror.take_rows(rows, size)


def _padded(
    shape: KvShape, decode: DecodeRows, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of each row, padded to the longest, and what says which of their tokens count."""
    counts = np.diff(decode.begins, append=len(decode.tables))
    tables = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
    for row, (begin, count) in enumerate(zip(decode.begins, counts, strict=True)):
        tables[row, :count] = decode.tables[begin : begin + count]
    lengths = torch.from_numpy(decode.lengths.astype(np.int64)).to(device)
    bias = row_bias(lengths, tables.shape[1] * shape.block_tokens)
    return torch.from_numpy(tables).to(device), bias
