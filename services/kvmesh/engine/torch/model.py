"""The forward pass of a Llama-family model, one layer at a time.

    hidden = embedding[ids]
    for each layer:
        hidden += output(attention(rope(qkv(norm(hidden)))))
        hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))
    logits = head(norm(hidden))

Rows of all slices of a batch go through the products together; attention is
the only place where a row sees other rows, and only those of its sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvmesh.engine.torch.paged_kv import BatchKv
from kvmesh.engine.torch.weights import LayerWeights, ModelWeights


class LlamaModel:
    """Weights and how they are applied."""

    def __init__(self, weights: ModelWeights, norm_epsilon: float) -> None:
        self._weights = weights
        self._epsilon = norm_epsilon

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._weights.layers)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] ids to [n, hidden]."""
        return F.embedding(ids, self._weights.embedding)

    def layer(self, index: int, hidden: torch.Tensor, kv: BatchKv) -> None:
        """Runs layer `index` on `hidden` [n, hidden], in place."""
        weights = self._weights.layers[index]
        hidden += self._attention(weights, index, hidden, kv)
        hidden += self._mlp(weights, hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, hidden] to [s, vocabulary], float32."""
        return self._weights.head(self._norm(hidden, self._weights.final_norm)).float()

    def _attention(
        self, weights: LayerWeights, index: int, hidden: torch.Tensor, kv: BatchKv
    ) -> torch.Tensor:
        qkv = weights.qkv(self._norm(hidden, weights.input_norm))
        q = kv.write(index, qkv)
        return weights.output(kv.attend(index, q))

    def _mlp(self, weights: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = weights.gate_up(self._norm(hidden, weights.mlp_norm)).chunk(2, dim=-1)
        return weights.down(F.silu(gate).mul_(up))

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (arXiv:1910.07467), in float32 whatever the weights are in."""
        return F.rms_norm(hidden, weight.shape, weight, self._epsilon)
