"""K and V on a CPU in float32, by kernels of ours in the pool's own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvmesh.engine.torch.attention import attend_prefill
from kvmesh.engine.torch.paged_kv import KvShape
from kvmesh.engine.torch.plan import Plan

if TYPE_CHECKING:
    from kvmesh._router import KvPool
    from kvmesh._router import PagedKv as Kernels

_TOKENS_A_THREAD = 4096
"""Context tokens that are worth a thread of their own: about 0.3 ms of work."""


class NativeKv:
    """See `PagedKv`."""

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

    def begin(self, plan: Plan) -> NativeBatch:
        """As `PagedKv.begin`."""
        return NativeBatch(self._shape, self._kernels, self._blocks, plan, self._threads)


class NativeBatch:
    """See `BatchKv`."""

    def __init__(
        self, shape: KvShape, kernels: Kernels, blocks: torch.Tensor, plan: Plan, threads: int
    ) -> None:
        self._shape = shape
        self._kernels = kernels
        self._blocks = blocks
        self._plan = plan
        self._cos, self._sin = plan.cos.numpy(), plan.sin.numpy()
        self._slots = plan.slots.numpy()
        context = 0 if plan.decode is None else int(plan.decode.lengths.sum())
        self._threads = max(1, min(threads, context // _TOKENS_A_THREAD))

    def write(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """As `BatchKv.write`."""
        q = torch.empty(qkv.shape[0], self._shape.heads * self._shape.head_size)
        self._kernels.write(layer, qkv.numpy(), self._cos, self._sin, self._slots, q.numpy())
        return q

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """As `BatchKv.attend`."""
        out = torch.empty_like(q)
        for piece in self._plan.prefill:
            attend_prefill(self._shape, self._blocks[:, layer], q, piece, None, out)
        rows = self._plan.decode
        if rows is not None:
            self._kernels.attend(
                layer,
                q.numpy(),
                rows.rows,
                rows.begins,
                rows.tables,
                rows.lengths,
                out.numpy(),
                threads=self._threads,
            )
        return out

    def finish(self) -> None:
        """Nothing to do: the pool is where it was written."""
