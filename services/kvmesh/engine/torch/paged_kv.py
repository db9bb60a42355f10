"""K and V in the blocks of a pool: writing new tokens, attending over old ones.

A block is [layers, K|V, kv heads, block tokens, head size] (format 1 of
KvCompatibility in worker.proto), one contiguous piece, so that it moves to
another worker as it is.

Two ways with the same results to the last bits: `NativeKv` computes on a CPU
in float32 with kernels that read blocks where they lie; `TorchKv` computes on
any device and in any dtype with torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from kvmesh.engine.torch.plan import DecodeRows, Plan, PrefillSlice
from kvmesh.engine.torch.rope import rotate
from kvmesh.models import ModelConfig

if TYPE_CHECKING:
    from kvmesh._router import KvPool

_TOKENS_A_THREAD = 4096
"""Context tokens that are worth a thread of their own: about 0.3 ms of work."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes of a block."""

    layers: int
    heads: int
    kv_heads: int
    block_tokens: int
    head_size: int

    @classmethod
    def of(cls, config: ModelConfig, block_tokens: int) -> KvShape:
        """The shape of a model's blocks."""
        return cls(config.layers, config.heads, config.kv_heads, block_tokens, config.head_size)

    @property
    def elements(self) -> int:
        """Numbers in a block."""
        return self.layers * 2 * self.kv_heads * self.block_tokens * self.head_size

    def view(self, pool: KvPool, dtype: torch.dtype) -> torch.Tensor:
        """The pool's memory as [slots, layers, 2, kv heads, block tokens, head size]."""
        flat = torch.frombuffer(pool, dtype=dtype)
        slots = flat.numel() // self.elements
        sizes = (slots, self.layers, 2, self.kv_heads, self.block_tokens, self.head_size)
        return flat[: slots * self.elements].view(sizes)


class PagedKv(Protocol):
    """K and V of all sequences, for one batch after the other."""

    def begin(self, plan: Plan) -> None:
        """Called before the first layer of a batch."""

    def write(self, layer: int, qkv: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Rotates q and k, stores k and v; returns q, [n, heads * head size]."""

    def attend(self, layer: int, q: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Attention of each row over its sequence, [n, heads * head size]."""

    def finish(self, plan: Plan) -> None:
        """Called after the last layer: what was written is in the pool."""


class NativeKv:
    """On a CPU in float32, in the pool's own memory."""

    def __init__(self, shape: KvShape, pool: KvPool, threads: int) -> None:
        from kvmesh._router import PagedKv as Kernels

        self._shape = shape
        self._threads = threads
        self._blocks = shape.view(pool, torch.float32)
        self._kernels = Kernels(
            pool,
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            block_tokens=shape.block_tokens,
            head_size=shape.head_size,
        )

    def begin(self, plan: Plan) -> None:
        """Nothing to prepare."""

    def finish(self, plan: Plan) -> None:
        """Nothing to do: the pool is where it was written."""

    def write(self, layer: int, qkv: torch.Tensor, plan: Plan) -> torch.Tensor:
        """As `PagedKv.write`."""
        q = torch.empty(qkv.shape[0], self._shape.heads * self._shape.head_size)
        self._kernels.write(
            layer,
            qkv.numpy(),
            plan.cos.numpy(),
            plan.sin.numpy(),
            plan.slots.numpy(),
            q.numpy(),
        )
        return q

    def attend(self, layer: int, q: torch.Tensor, plan: Plan) -> torch.Tensor:
        """As `PagedKv.attend`."""
        out = torch.empty_like(q)
        for piece in plan.prefill:
            _attend_prefill(self._shape, self._blocks[:, layer], q, piece, out)
        if plan.decode is not None:
            rows = plan.decode
            work = int(rows.lengths.sum()) // _TOKENS_A_THREAD
            self._kernels.attend(
                layer,
                q.numpy(),
                rows.rows,
                rows.begins,
                rows.tables,
                rows.lengths,
                out.numpy(),
                threads=max(1, min(self._threads, work)),
            )
        return out


class TorchKv:
    """On any device, in any dtype.

    On a device with memory of its own the blocks are mirrored there. A mirrored
    block is known by the version of its slot: a block that was given out anew,
    or filled by a transfer, has another one and is copied in before use. What is
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
        self._pool = pool
        self._host = shape.view(pool, dtype)
        self._blocks = self._host
        self._mirrored = device.type != "cpu" if mirror is None else mirror
        if self._mirrored:
            self._blocks = torch.zeros_like(self._host, device=device)
            self._versions = np.full(self._host.shape[0], -1, dtype=np.int64)

    def begin(self, plan: Plan) -> None:
        """Copies in the blocks that the mirror does not have."""
        if not self._mirrored:
            return
        used = [piece.blocks.cpu().numpy() for piece in plan.prefill]
        if plan.decode is not None:
            used.append(plan.decode.tables.astype(np.int64))
        slots = np.unique(np.concatenate(used))
        versions = np.array([self._pool.slot_version(int(slot)) for slot in slots], dtype=np.int64)
        stale = versions != self._versions[slots]
        if stale.any():
            wanted = torch.from_numpy(slots[stale])
            self._blocks[wanted.to(self._blocks.device)] = self._host[wanted].to(
                self._blocks.device
            )
            self._versions[slots[stale]] = versions[stale]

    def finish(self, plan: Plan) -> None:
        """Copies what was computed out to the pool."""
        if not self._mirrored:
            return
        block, place = self._places(plan)
        new = self._blocks[block, :, :, :, place].cpu()
        self._host[block.cpu(), :, :, :, place.cpu()] = new

    def _places(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._shape.block_tokens
        return plan.slots // size, plan.slots % size

    def write(self, layer: int, qkv: torch.Tensor, plan: Plan) -> torch.Tensor:
        """As `PagedKv.write`."""
        shape = self._shape
        heads = qkv.view(qkv.shape[0], -1, shape.head_size)
        q, k, v = torch.tensor_split(heads, (shape.heads, shape.heads + shape.kv_heads), dim=1)
        block, place = self._places(plan)
        self._blocks[block, layer, 0, :, place] = rotate(k, plan.cos, plan.sin)
        self._blocks[block, layer, 1, :, place] = v
        return rotate(q, plan.cos, plan.sin).flatten(1)

    def attend(self, layer: int, q: torch.Tensor, plan: Plan) -> torch.Tensor:
        """As `PagedKv.attend`."""
        out = torch.empty_like(q)
        for piece in plan.prefill:
            _attend_prefill(self._shape, self._blocks[:, layer], q, piece, out)
        if plan.decode is not None:
            _attend_decode(self._shape, self._blocks[:, layer], q, plan.decode, out)
        return out


def _attend_prefill(
    shape: KvShape, blocks: torch.Tensor, q: torch.Tensor, piece: PrefillSlice, out: torch.Tensor
) -> None:
    """One slice over its sequence; `blocks` is one layer of the pool.

    K and V are gathered once for all rows of the slice, so at 128 rows and
    more the copy is a few per cent of the attention.
    """
    gathered = blocks.index_select(0, piece.blocks).permute(1, 2, 0, 3, 4)
    k, v = gathered.reshape(2, 1, shape.kv_heads, -1, shape.head_size)[:, :, :, : piece.length]
    queries = q[piece.begin : piece.end].view(1, -1, shape.heads, shape.head_size)
    if piece.start and q.device.type == "cpu":
        attended = _attend_after(shape, queries, k, v, piece.start)
        out[piece.begin : piece.end] = attended[0].transpose(0, 1).flatten(1)
        return
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        k,
        v,
        attn_mask=piece.mask,
        is_causal=piece.mask is None,
        enable_gqa=True,
    )
    out[piece.begin : piece.end] = attended[0].transpose(0, 1).flatten(1)


def _attend_after(
    shape: KvShape, queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int
) -> torch.Tensor:
    """Rows that follow `start` tokens: [1, rows, heads, d] to [1, heads, rows, d].

    Over what precedes them without a mask, over one another causally, and the two
    merged by their log-sum-exp (Dao et al., arXiv:2205.14135). With one mask over
    all, the kernel computes what the mask then takes away, and the mask costs as
    much again: 5 to 50 % slower at 128 to 512 rows after 512 to 1,536 tokens.
    """
    rows, size = queries.shape[1], shape.head_size
    kv_heads, group = shape.kv_heads, shape.heads // shape.kv_heads
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    grouped = queries.view(1, rows, kv_heads, group, size).permute(0, 2, 3, 1, 4)
    # Heads that share K and V as further rows: nothing has to be repeated.
    before, before_sum = attend(
        grouped.reshape(1, kv_heads, group * rows, size), k[:, :, :start], v[:, :, :start]
    )
    own_k, own_v = (
        kv[:, :, None, start:].expand(-1, -1, group, -1, -1).reshape(1, shape.heads, rows, size)
        for kv in (k, v)
    )
    own, own_sum = attend(grouped.reshape(1, shape.heads, rows, size), own_k, own_v, is_causal=True)
    share = torch.sigmoid(before_sum.reshape(own_sum.shape) - own_sum).to(own.dtype)
    merged: torch.Tensor = torch.lerp(own, before.reshape(own.shape), share[..., None])
    return merged


def _attend_decode(
    shape: KvShape, blocks: torch.Tensor, q: torch.Tensor, decode: DecodeRows, out: torch.Tensor
) -> None:
    """All single rows at once, their blocks padded to the longest."""
    device = q.device
    counts = np.diff(decode.begins, append=len(decode.tables))
    padded = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
    for row, (begin, count) in enumerate(zip(decode.begins, counts, strict=True)):
        padded[row, :count] = decode.tables[begin : begin + count]
    tables = torch.from_numpy(padded).to(device)
    lengths = torch.from_numpy(decode.lengths.astype(np.int64)).to(device)
    # [b, blocks, 2, kv heads, block tokens, head size], tokens brought together.
    gathered = blocks[tables].permute(2, 0, 3, 1, 4, 5)
    k, v = gathered.reshape(2, len(counts), shape.kv_heads, -1, shape.head_size)
    rows = torch.from_numpy(decode.rows.astype(np.int64)).to(device)
    queries = q[rows].view(-1, shape.heads, 1, shape.head_size)
    mask = torch.arange(k.shape[2], device=device) < lengths[:, None]
    attended = F.scaled_dot_product_attention(
        queries, k, v, attn_mask=mask[:, None, None], enable_gqa=True
    )
    out[rows] = attended.flatten(1)
