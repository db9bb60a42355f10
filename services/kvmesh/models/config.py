"""A model's config.json, as a value that can be run or an error that says why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.models.errors import UnsupportedModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Architectures of the Llama family that the torch engine computes exactly."""

SUPPORTED_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Ways to stretch rotary positions over a longer context."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and how it is stretched.

    linear: arXiv:2306.15595; dynamic: NTK-aware, by sequence length; yarn:
    arXiv:2309.00071; llama3: the scheme published with Llama 3.1.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    """Context before stretching, tokens. yarn and llama3."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None: from `factor` and the mscales."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything of config.json that decides what is computed."""

    architecture: str
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    norm_epsilon: float
    context_length: int
    rope: RopeConfig
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool


def load_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json.

    Raises `UnsupportedModelError` for what cannot be computed exactly, by name.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModelError(f"{folder} has no config.json") from error
    except ValueError as error:
        raise UnsupportedModelError(f"{folder}/config.json is not JSON: {error}") from error
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turns a config.json into a `ModelConfig`; raises `UnsupportedModelError`."""
    architecture = _architecture(raw)
    _refuse_variants(raw, architecture)
    try:
        return _build(raw, architecture)
    except KeyError as error:
        raise UnsupportedModelError(f"config.json lacks {error.args[0]!r}") from error


def _build(raw: Mapping[str, Any], architecture: str) -> ModelConfig:
    heads = int(raw["num_attention_heads"])
    hidden = int(raw["hidden_size"])
    context = int(raw["max_position_embeddings"])
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocabulary_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_size=int(raw.get("head_dim") or hidden // heads),
        norm_epsilon=float(raw["rms_norm_eps"]),
        context_length=context,
        rope=_rope(raw, context),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        # Qwen2 has biases on q, k and v alone, and no field that says so.
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias and architecture == "LlamaForCausalLM",
        mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    found = ", ".join(names) or f"model_type {raw.get('model_type', 'unknown')!r}"
    raise UnsupportedModelError(
        f"architecture {found} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _refuse_variants(raw: Mapping[str, Any], architecture: str) -> None:
    """Refuses fields that change the computation and are not implemented."""
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act {raw['hidden_act']!r}: only 'silu' is supported")
    if raw.get("quantization_config"):
        raise UnsupportedModelError("quantised weights (quantization_config) are not supported")
    sliding = raw.get("sliding_window")
    if architecture == "Qwen2ForCausalLM":
        sliding = sliding if raw.get("use_sliding_window") else None
    if sliding is not None and int(sliding) < int(raw.get("max_position_embeddings", 0)):
        raise UnsupportedModelError(
            f"sliding_window {sliding}: windowed attention is not supported"
        )
    if float(raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")


def _rope(raw: Mapping[str, Any], context: int) -> RopeConfig:
    """Reads `rope_parameters` (newer files) or `rope_theta` and `rope_scaling`."""
    fields = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = float(fields.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = str(fields.get("rope_type", fields.get("type", "default")))
    if kind not in SUPPORTED_ROPES:
        raise UnsupportedModelError(
            f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPES)}"
        )
    original = int(fields.get("original_max_position_embeddings") or context)
    factor = fields.get("factor")
    factor_value = context / original if factor is None else float(factor)
    attention_factor = fields.get("attention_factor")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor_value,
        original_context=original,
        low_freq_factor=float(fields.get("low_freq_factor") or 1.0),
        high_freq_factor=float(fields.get("high_freq_factor") or 4.0),
        beta_fast=float(fields.get("beta_fast") or 32.0),
        beta_slow=float(fields.get("beta_slow") or 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
        mscale=float(fields.get("mscale") or 0.0),
        mscale_all_dim=float(fields.get("mscale_all_dim") or 0.0),
        truncate=bool(fields.get("truncate", True)),
    )
