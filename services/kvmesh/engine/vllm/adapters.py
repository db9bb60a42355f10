"""LoRA adapters in folders: what vLLM and the worker's record are told of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmesh.engine.vllm.arguments import ArgumentError

CONFIG = "adapter_config.json"

_LEAST_RANK = 16
"""vLLM's own default of max_lora_rank."""


def arguments(
    folders: Mapping[str, Path], given: Mapping[str, Any], allowed_ranks: Sequence[int]
) -> dict[str, Any]:
    """vLLM's for these adapters, by name; what is `given` goes before them. `allowed_ranks`: of
    max_lora_rank. Raises ArgumentError."""
    if not folders:
        return {}
    found: dict[str, Any] = {"enable_lora": True, "max_loras": len(folders)}
    if isinstance(at_once := given.get("max_loras"), int):
        # All stay loaded, also where fewer may share a step.
        found["max_cpu_loras"] = max(at_once, len(folders))
    ranks = {name: _rank(name, folder) for name, folder in folders.items()}
    name = max(ranks, key=lambda name: ranks[name])
    limit = given.get("max_lora_rank", max(allowed_ranks))
    if isinstance(limit, int) and ranks[name] > limit:
        raise ArgumentError(
            f"engine_arguments lora.{name} has rank {ranks[name]}; allowed are up to {limit}"
            + (" (vllm_arg max_lora_rank)" if "max_lora_rank" in given else "")
        )
    enough = [rank for rank in allowed_ranks if rank >= max(_LEAST_RANK, ranks[name])]
    if enough:
        found["max_lora_rank"] = min(enough)
    return found


def _rank(name: str, folder: Path) -> int:
    """Highest rank of an adapter's modules."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise ValueError(f"ranks are {ranks}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"engine_arguments lora.{name}: {folder / CONFIG} cannot be read: "
            f"{type(error).__name__}: {error}; allowed is PEFT's, with the rank as r"
        ) from error
    return int(max(ranks))


def digest(folder: Path) -> str:
    """SHA-256 over an adapter's files."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin") and file.is_file():
            found.update(file.name.encode() + b"\0" + file.stat().st_size.to_bytes(8, "little"))
            with file.open("rb") as content:
                while chunk := content.read(8 << 20):
                    found.update(chunk)
    return found.hexdigest()
