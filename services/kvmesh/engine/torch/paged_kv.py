"""K and V in the blocks of a pool: what the forward pass asks for.

A block is [layers, K|V, kv heads, block tokens, head size] (format 1 of
KvCompatibility in worker.proto), one contiguous piece, so that it moves to
another worker as it is.

Two ways with the same results to the last bits: `native_kv` computes on a CPU
in float32 with kernels that read blocks where they lie; `torch_kv` computes on
any device and in any dtype with torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvmesh.engine.torch.plan import Plan
from kvmesh.models import ModelConfig

if TYPE_CHECKING:
    from kvmesh._router import KvPool


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
    """K and V of all sequences. Several batches may be under way, one of them computing."""

    def begin(self, plan: Plan) -> BatchKv:
        """Called before the first layer of a batch."""


class BatchKv(Protocol):
    """K and V for the layers of one batch. What it needs to know is made once, not a layer."""

    def write(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Rotates q and k, stores k and v; returns q, [n, heads * head size]."""

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Attention of each row over its sequence, [n, heads * head size]."""

    def finish(self) -> None:
        """Called after the last layer: what was written is in the pool."""
