"""Names for content: what two workers must have in common to share KV.

Model digest: SHA-256 over the computing part of config.json (rope included)
and over every weight by name, so the same weights in one file or in five
shards are one model. Tokeniser digest: as TokenizerHeader in worker.proto.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from kvmesh.models.config import load_config
from kvmesh.models.safetensors_file import read_entries, weight_files

_RECORD = "kvmesh-digest.json"
_CHUNK = 8 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What a tokeniser consists of, in the order of the digest."""

Advance = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokeniser's files that are there, in the order of the digest."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def tokenizer_digest(folder: Path) -> str:
    """Digest over the tokeniser's files: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in tokenizer_files(folder):
        content = file.read_bytes()
        digest.update(file.name.encode() + b"\0" + len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def model_digest(folder: Path, cache: Path, advance: Advance | None = None) -> str:
    """Digest over weights and config: 64 hexadecimal digits.

    It is kept beside files that lie in `cache`, else in `cache`/digests (other
    people's folders are not written to), with the sizes and times of the files
    that it was taken from; when those change it is taken anew.
    """
    files = [folder / "config.json", *weight_files(folder)]
    if (folder / "generation_config.json").exists():
        files.append(folder / "generation_config.json")
    stamp = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    record = _record_path(folder, cache)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["digest"])
    except (FileNotFoundError, ValueError, KeyError):
        # Never taken, or not a record of ours: take it now.
        pass
    digest = _take(folder, advance)
    record.parent.mkdir(parents=True, exist_ok=True)
    # Two workers that start together both take it; each renames its own whole.
    part = record.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"digest": digest, "stamp": stamp}), encoding="utf-8")
    part.replace(record)
    return digest


def _record_path(folder: Path, cache: Path) -> Path:
    folder = folder.resolve()
    if folder.is_relative_to(cache.resolve()):
        return folder / _RECORD
    return cache / "digests" / f"{hashlib.sha256(bytes(folder)).hexdigest()[:32]}.json"


def _take(folder: Path, advance: Advance | None) -> str:
    config = dataclasses.asdict(load_config(folder))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + b"\0")
    entries = [entry for file in weight_files(folder) for entry in read_entries(file)]
    entries.sort(key=lambda entry: entry.name)
    total = sum(entry.size for entry in entries)
    done = 0
    for entry in entries:
        head = f"{entry.name}\0{entry.dtype}\0{list(entry.shape)}\0"
        digest.update(head.encode())
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            left = entry.size
            while left:
                piece = stream.read(min(left, _CHUNK))
                if not piece:
                    raise OSError(f"{entry.file} ended while it was read")
                digest.update(piece)
                left -= len(piece)
                done += len(piece)
                if advance is not None:
                    advance(done, total)
    return digest.hexdigest()
