"""Rotary position embedding: frequencies of each way to stretch a context.

All arithmetic in float32 and in the order that the checkpoints were trained
and are evaluated with, so that angles agree to the bit at every position.
"""

from __future__ import annotations

import math

import torch

from kvmesh.models import RopeConfig


class Rope:
    """Cosines and sines of positions."""

    def __init__(self, config: RopeConfig, head_size: int, device: torch.device) -> None:
        self._frequencies = _frequencies(config, head_size).to(device)
        self._scale = _amplitude(config)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [n, head_size / 2] float32, of `positions` [n]."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        return angles.cos() * self._scale, angles.sin() * self._scale


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates [n, heads, head_size]: element i is paired with i + head_size / 2."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(heads.dtype), sin[:, None].to(heads.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequencies(config: RopeConfig, head_size: int) -> torch.Tensor:
    """Radians a position of each pair, [head_size / 2]."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).to(torch.float32) / head_size
    base: torch.Tensor = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return base / config.factor
    if config.kind == "llama3":
        return _llama3(config, base)
    if config.kind == "yarn":
        return _yarn(config, head_size)
    # "dynamic" stretches only sequences longer than the trained context. A
    # context length is never passed here (ModelConfig.context_length), because
    # cached keys would then depend on how long the sequence became later.
    return base


def _llama3(config: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    long_wave = config.original_context / config.low_freq_factor
    short_wave = config.original_context / config.high_freq_factor
    wave = 2 * math.pi / base
    stretched = torch.where(wave > long_wave, base / config.factor, base)
    share = (config.original_context / wave - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - share) * stretched / config.factor + share * stretched
    between = ~(wave < short_wave) * ~(wave > long_wave)
    return torch.where(between, blended, stretched)


def _yarn(config: RopeConfig, head_size: int) -> torch.Tensor:
    """Pairs that turn often are kept, those that turn seldom stretched (arXiv:2309.00071)."""

    def pair_of(turns: float) -> float:
        """The pair that turns so often over the original context."""
        return (
            head_size
            * math.log(config.original_context / (turns * 2 * math.pi))
            / (2 * math.log(config.theta))
        )

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(head_size // 2, dtype=torch.float32)
    kept = 1 - ((steps - low) / (high - low)).clamp(0, 1)
    powers = config.theta ** (torch.arange(0, head_size, 2).to(torch.float32) / head_size)
    return (1.0 / (config.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def _amplitude(config: RopeConfig) -> float:
    """What cosines and sines are multiplied by: 1 but for yarn."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def scale(weight: float) -> float:
        if config.factor <= 1:
            return 1.0
        return 0.1 * weight * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)
