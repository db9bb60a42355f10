"""Which model a worker serves by vLLM: its folder, names and digest.

vLLM knows many more architectures than kvmesh's own engine. For those of both,
names and digests are the same, so that routers see one model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmesh import models
from kvmesh.models import ModelNotFoundError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that lies on this machine."""

    folder: Path
    name: str
    digest: str
    end_of_text_ids: tuple[int, ...]


def find(
    name: str, progress: Callable[[str], None], cancellation: models.Cancellation | None = None
) -> ServedModel:
    """A name of the catalogue, a folder, or an id of the hub. Raises ModelError; where it is
    given up `models.LoadCancelledError`."""
    cancellation = cancellation or models.Cancellation()
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        folder, short = path.resolve(), path.resolve().name
    elif name.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"there is no model in {name}: it has no config.json")
    else:
        progress(f"model: looking for {name}")
        folder, short = models.pull(name, cancellation=cancellation), name
    try:
        digest = models.model_digest(folder, models.cache_folder(), lambda *_: cancellation.check())
    except UnsupportedModelError:
        progress("model: taking its digest")
        digest = plain_digest(folder, models.cache_folder(), cancellation)
    return ServedModel(folder, short, digest, models.end_of_text_ids_of(folder))


def plain_digest(folder: Path, cache: Path, cancellation: models.Cancellation | None = None) -> str:
    """SHA-256 over config.json and the weights' files, of models that kvmesh's own engine does
    not know. Kept in `cache`, by the files' sizes and times: it takes a minute for 60 GB."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ModelNotFoundError(f"{folder} has no weights (*.safetensors)")
    files = [folder / "config.json", *files]
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    record = cache / "digests" / f"{key}.plain.json"
    cancellation = cancellation or models.Cancellation()
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["digest"])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as content:
            while chunk := content.read(8 << 20):
                digest.update(chunk)
                cancellation.check()
    record.parent.mkdir(parents=True, exist_ok=True)
    part = record.with_suffix(".part")
    part.write_text(json.dumps({"digest": digest.hexdigest(), "stamp": stamp}), encoding="utf-8")
    part.replace(record)
    return digest.hexdigest()
