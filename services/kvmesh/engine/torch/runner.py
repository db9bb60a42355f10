"""The torch runner: a batch of slices through a model, over a KV pool."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvmesh.engine.core.runner import Sampled, SampleSpec, Slice
from kvmesh.engine.torch.decode_graph import Capture, DecodeGraphs, cuda_capture
from kvmesh.engine.torch.model import LlamaModel
from kvmesh.engine.torch.native_kv import NativeKv
from kvmesh.engine.torch.paged_kv import BatchKv, KvShape, PagedKv
from kvmesh.engine.torch.plan import DecodeRows, Plan, make_plan, only_rows
from kvmesh.engine.torch.rope import Rope
from kvmesh.engine.torch.sampling import draw
from kvmesh.engine.torch.torch_kv import TorchKv
from kvmesh.engine.torch.weights import ModelWeights
from kvmesh.models import ModelConfig
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh._router import KvPool


class TorchRunner:
    """Computes batches of one model (kvmesh.engine.core.runner.Runner).

    Everything of a batch lives in its generator, and K and V of its tokens go
    to blocks that are its sequences' own. So another batch may run between two
    layers, and this one ends equal to the bit.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        model_digest: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_tokens: int,
        threads: int,
    ) -> None:
        self._config = config
        self._model = LlamaModel(weights, config.norm_epsilon)
        self._rope = Rope(config.rope, config.head_size, device)
        self._shape = KvShape.of(config, block_tokens)
        self._digest = model_digest
        self._dtype = dtype
        self._device = device
        self._threads = threads
        self._kv: PagedKv | None = None
        self._graphs: DecodeGraphs | None = None

    @property
    def block_tokens(self) -> int:
        """KV block size in tokens."""
        return self._shape.block_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: all layers, K and V."""
        return self._shape.elements * self._dtype.itemsize

    @property
    def layers(self) -> int:
        """Pauses that `forward` offers."""
        return self._model.layers

    def compatibility(self) -> wire.KvCompatibility:
        """What transfer partners must agree on."""
        return wire.KvCompatibility(
            model_digest=self._digest,
            dtype=str(self._dtype).removeprefix("torch."),
            format=1,
            layers=self._config.layers,
            kv_heads=self._config.kv_heads,
            head_size=self._config.head_size,
        )

    def bind(self, pool: KvPool) -> None:
        """Takes the pool whose slots `Slice.blocks` name."""
        if self._kv is not None:
            raise RuntimeError("a runner is bound to one pool")
        if self._device.type == "cpu" and self._dtype == torch.float32:
            self._kv = NativeKv(self._shape, pool, self._threads)
            return
        kv = TorchKv(self._shape, pool, self._dtype, self._device)
        self._kv = kv
        if self._device.type == "cuda":
            self.use_graphs(kv, cuda_capture())

    def use_graphs(self, kv: TorchKv, capture: Capture) -> None:
        """Runs steps of decoding streams alone at once, over the blocks on the device."""
        if kv.mirror is None:
            raise ValueError("graphs need the pool's blocks on a device")
        self._graphs = DecodeGraphs(self._model, self._rope, self._shape, kv.mirror, capture)

    def forward(self, batch: Sequence[Slice]) -> Generator[None, None, list[Sampled | None]]:
        """Computes a batch, pausing after each layer (see Runner.forward)."""
        if self._kv is None:
            raise RuntimeError("bind a pool first")
        if not batch:
            return []
        if self._graphs is not None:
            rows = only_rows(batch, self.block_tokens)
            if rows is not None and self._graphs.fits(rows):
                return self._decode(batch, rows, self._graphs)
        plan, kv, hidden = self._begin(batch, self._kv)
        for index in range(self.layers):
            self._layer(index, hidden, kv)
            yield
        return self._finish(batch, hidden, kv, plan)

    def close(self) -> None:
        """Gives the pool's memory back. Idempotent."""
        self._kv = self._graphs = None

    # Inference mode belongs to a thread, not to a generator: entered across a
    # pause it would hold for whatever else runs there. So each part enters it.

    @torch.inference_mode()
    def _begin(self, batch: Sequence[Slice], pool: PagedKv) -> tuple[Plan, BatchKv, torch.Tensor]:
        plan = make_plan(batch, self.block_tokens, self._rope, self._device)
        return plan, pool.begin(plan), self._model.embed(plan.ids)

    @torch.inference_mode()
    def _layer(self, index: int, hidden: torch.Tensor, kv: BatchKv) -> None:
        self._model.layer(index, hidden, kv)

    @torch.inference_mode()
    def _finish(
        self, batch: Sequence[Slice], hidden: torch.Tensor, kv: BatchKv, plan: Plan
    ) -> list[Sampled | None]:
        kv.finish()
        return self._draw(batch, hidden, plan.sampled)

    @torch.inference_mode()
    def _decode(
        self, batch: Sequence[Slice], rows: DecodeRows, graphs: DecodeGraphs
    ) -> list[Sampled | None]:
        ids = np.array([piece.ids[0] for piece in batch], dtype=np.int64)
        hidden = graphs.run(ids, rows)
        sampled = [row for row, piece in enumerate(batch) if piece.sample is not None]
        return self._draw(batch, hidden, torch.tensor(sampled, device=self._device))

    def _draw(
        self, batch: Sequence[Slice], hidden: torch.Tensor, sampled: torch.Tensor
    ) -> list[Sampled | None]:
        specs: list[SampleSpec] = [piece.sample for piece in batch if piece.sample is not None]
        if not specs:
            return [None] * len(batch)
        drawn = iter(draw(self._model.logits(hidden[sampled]), specs))
        return [None if piece.sample is None else next(drawn) for piece in batch]
