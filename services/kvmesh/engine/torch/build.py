"""From settings to a runner: what a worker calls at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from kvmesh import models
from kvmesh.engine.torch.runner import TorchRunner
from kvmesh.engine.torch.weights import load_weights
from kvmesh.v1 import worker_pb2 as wire

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """Settings of the torch engine."""

    model: str
    """Name of the catalogue, folder or hub id; it must be here already."""
    served_name: str = ""
    """Name that clients ask for. Default: `model`, of a path its last part."""
    device: str = "cpu"
    """As torch names devices: "cpu", "cuda", "cuda:1"."""
    dtype: DType | None = None
    """Default: float32 on a CPU, bfloat16 elsewhere."""
    threads: int | None = None
    """Of torch and of the attention kernels. Default: torch's own choice."""
    block_tokens: int = 16
    """KV block size in tokens: a multiple of 16."""


class Built(NamedTuple):
    """A model that is ready to run."""

    runner: TorchRunner
    record: wire.ModelRecord
    folder: Path
    """Where its tokeniser files lie (kvmesh.models.tokenizer_files)."""


def build(settings: TorchSettings, progress: models.Progress = models.silent) -> Built:
    """Loads a model. Takes seconds; raises `kvmesh.models.ModelError`."""
    if settings.block_tokens <= 0 or settings.block_tokens % 16:
        raise ValueError(f"block_tokens is {settings.block_tokens}, not a multiple of 16")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = models.resolve(settings.model)
    config = models.load_config(folder)
    digest = models.model_digest(
        folder, models.cache_folder(), lambda done, total: progress("digest", done, total)
    )
    device = torch.device(settings.device)
    dtype = getattr(torch, settings.dtype or _default_dtype(device))
    runner = TorchRunner(
        config,
        load_weights(folder, config, dtype, device, progress),
        digest,
        dtype=dtype,
        device=device,
        block_tokens=settings.block_tokens,
        threads=torch.get_num_threads(),
    )
    record = wire.ModelRecord(
        name=settings.served_name or _short_name(settings.model),
        digest=digest,
        tokenizer_digest=models.tokenizer_digest(folder),
        context_length=config.context_length,
        vocabulary_size=config.vocabulary_size,
        end_of_text_ids=models.end_of_text_ids_of(folder),
    )
    return Built(runner, record, folder)


def _default_dtype(device: torch.device) -> DType:
    return "float32" if device.type == "cpu" else "bfloat16"


def _short_name(model: str) -> str:
    is_path = model.startswith((".", "/", "~")) or Path(model).is_dir()
    return Path(model).expanduser().resolve().name if is_path else model
