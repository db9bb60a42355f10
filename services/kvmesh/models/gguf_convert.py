"""A Hugging Face folder out of a GGUF file of a Llama model.

Weights are dequantised to float32: what a quantised file can say is kept
exactly, and nothing later depends on its format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.models.errors import ModelError, UnsupportedModelError
from kvmesh.models.gguf_tokenizer import tokenizer_config_json, tokenizer_json
from kvmesh.models.safetensors_file import SINGLE, write_float32

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def convert(source: Path, target: Path, advance: Callable[[int, int], None]) -> None:
    """Writes weights, config and tokeniser of `source` into the folder `target`.

    `advance` is called with bytes written and bytes in all. Raises
    `UnsupportedModelError` for anything but a Llama model with a known
    tokeniser.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModelError("converting a GGUF file needs `pip install kvmesh[torch]`") from error
    reader = gguf.GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama":
        raise UnsupportedModelError(
            f"GGUF architecture {metadata.get('general.architecture')!r} is not supported;"
            " supported: llama"
        )
    tensors = {hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
    config = config_json(metadata, tied="lm_head.weight" not in tensors)
    tokenizer = tokenizer_json(metadata)
    heads = config["num_attention_heads"], config["num_key_value_heads"]

    def values(name: str) -> npt.NDArray[np.float32]:
        tensor = tensors[name]
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            dense = unpermute(dense, heads[0])
        elif name.endswith("k_proj.weight"):
            dense = unpermute(dense, heads[1])
        return dense

    # GGUF writes the fastest dimension first.
    shapes = [
        (name, tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in tensors.items()
    ]
    total = sum(4 * int(np.prod(shape)) for _, shape in shapes)
    for done in write_float32(target / SINGLE, shapes, values):
        advance(done, total)
    context = config["max_position_embeddings"]
    _write(target / "config.json", config)
    _write(target / "generation_config.json", generation_json(config))
    _write(target / "tokenizer.json", tokenizer)
    _write(target / "tokenizer_config.json", tokenizer_config_json(metadata, context))


def hugging_face_name(name: str) -> str:
    """Name of a GGUF tensor in a Hugging Face checkpoint."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{kind}"
    raise UnsupportedModelError(f"GGUF tensor {name!r} has no place in a Llama model")


def unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k back to the order of Hugging Face.

    GGUF keeps the two halves of a rotary pair side by side; Hugging Face keeps
    the first halves of a head together, then the second halves.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def config_json(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of a GGUF file's metadata."""
    if any(name.startswith("llama.rope.scaling") for name in metadata):
        raise UnsupportedModelError("GGUF files with stretched rope are not supported")
    heads = int(metadata["llama.attention.head_count"])
    hidden = int(metadata["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(metadata.get("llama.rope.dimension_count", hidden // heads)),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "rms_norm_eps": _short(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _short(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def generation_json(config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: which tokens begin, end and pad."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config[name] is not None}


def _short(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
