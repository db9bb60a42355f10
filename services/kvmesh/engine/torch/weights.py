"""Weights from safetensors, joined as the forward pass wants them.

q, k and v become one matrix, gate and up another: one product instead of
three, over all rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kvmesh.engine.torch.linear import Linear
from kvmesh.models import ModelConfig, UnsupportedModelError
from kvmesh.models.progress import Progress, silent
from kvmesh.models.safetensors_file import weight_files

_STEP = "load weights"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer."""

    input_norm: torch.Tensor
    qkv: Linear
    """To [q heads | k heads | v heads], each of head_size."""
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    """To [gate | up]."""
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole model."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Linear


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
) -> ModelWeights:
    """Reads all shards of a model. Progress is told in bytes of the files.

    A tensor that is missing, of another shape or of no known use is refused
    by name: ignoring it would compute something else.
    """
    loader = _Loader(folder, dtype, device, progress)
    embedding = loader.take(
        "model.embed_tokens.weight", (config.vocabulary_size, config.hidden_size)
    )
    layers = tuple(_layer(loader, config, index) for index in range(config.layers))
    final_norm = loader.take("model.norm.weight", (config.hidden_size,))
    if config.tied_head:
        head = Linear(embedding, None)
        loader.ignore("lm_head.weight")
    else:
        head = Linear(loader.take("lm_head.weight", tuple(embedding.shape)), None)
    loader.finish()
    return ModelWeights(embedding, layers, final_norm, head)


def _layer(loader: _Loader, config: ModelConfig, index: int) -> LayerWeights:
    at = f"model.layers.{index}."
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.heads * config.head_size, config.kv_heads * config.head_size
    attention, mlp = at + "self_attn.", at + "mlp."
    return LayerWeights(
        input_norm=loader.take(at + "input_layernorm.weight", (hidden,)),
        qkv=loader.linear(
            {attention + "q_proj": q_size, attention + "k_proj": kv_size}
            | {attention + "v_proj": kv_size},
            hidden,
            config.qkv_bias,
        ),
        output=loader.linear({attention + "o_proj": hidden}, q_size, config.output_bias),
        mlp_norm=loader.take(at + "post_attention_layernorm.weight", (hidden,)),
        gate_up=loader.linear(
            {mlp + "gate_proj": inner, mlp + "up_proj": inner}, hidden, config.mlp_bias
        ),
        down=loader.linear({mlp + "down_proj": hidden}, inner, config.mlp_bias),
    )


class _Loader:
    """Takes tensors out of shards, and keeps account of them."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._where: dict[str, Any] = {}
        files = weight_files(folder)
        self._done, self._total = 0, sum(file.stat().st_size for file in files)
        progress(_STEP, 0, self._total)
        for file in files:
            shard: Any = safe_open(file, framework="pt", device="cpu")
            for name in shard.keys():  # noqa: SIM118 - not a dict
                self._where[name] = shard

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        shard = self._where.pop(name, None)
        if shard is None:
            raise UnsupportedModelError(f"the weights lack {name}")
        tensor: torch.Tensor = shard.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(
                f"{name} has shape {list(tensor.shape)}; config.json says {list(shape)}"
            )
        taken = tensor.to(device=self._device, dtype=self._dtype)
        self._done += tensor.nbytes
        self._progress(_STEP, self._done, self._total)
        return taken

    def linear(self, parts: dict[str, int], inputs: int, bias: bool) -> Linear:
        """One product for several projections of the same input."""
        weights = [self.take(f"{name}.weight", (rows, inputs)) for name, rows in parts.items()]
        biases = [self.take(f"{name}.bias", (rows,)) for name, rows in parts.items() if bias]
        return Linear(torch.cat(weights), torch.cat(biases) if bias else None)

    def ignore(self, name: str) -> None:
        self._where.pop(name, None)

    def finish(self) -> None:
        """Refuses tensors that nobody took."""
        # Old checkpoints store the rope frequencies, which config.json gives.
        left = sorted(name for name in self._where if not name.endswith("rotary_emb.inv_freq"))
        if left:
            raise UnsupportedModelError(
                f"the weights hold {len(left)} tensors of no known use, the first is {left[0]}"
            )
        # Heads of files, and what was ignored.
        self._progress(_STEP, self._total, self._total)
