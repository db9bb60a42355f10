"""The files of a model that routers tokenise with, from a server or from a folder."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmesh.engine.remote.server import UnusableError
from kvmesh.models import END_FILES
from kvmesh.worker.tokenizer_files import NAMES

_WANTED = tuple(dict.fromkeys((*NAMES, *END_FILES)))
MOST_BYTES = 256 * 1024 * 1024
"""Most that is taken and unpacked: the archive comes from another machine."""


def unzipped(archive: bytes) -> Mapping[str, bytes]:
    """The files of an archive that are wanted. Raises UnusableError."""
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            known = {entry.filename: entry for entry in opened.infolist()}
            entries = [known[name] for name in _WANTED if name in known]
            if sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise UnusableError("the server's tokeniser is larger than 256 MiB")
            for entry in entries:
                found[entry.filename] = opened.read(entry)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, NotImplementedError) as error:
        raise UnusableError(f"the server's tokeniser is no archive: {error}") from error
    return found


def in_folder(folder: Path) -> Mapping[str, bytes]:
    """The files of a folder in Hugging Face's form. Raises UnusableError."""
    found = {n: (folder / n).read_bytes() for n in _WANTED if (folder / n).is_file()}
    if NAMES[0] not in found:
        raise UnusableError(
            f"tokenizer is {str(folder)!r}, which has no {NAMES[0]}; allowed is a folder in "
            "Hugging Face's form"
        )
    return found


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except ValueError as error:
        raise UnusableError(f"{name} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def vocabulary_size(files: Mapping[str, bytes]) -> int:
    """Number of token ids: of the model where its config.json is here, or of its tokeniser."""
    config = _object(files, "config.json")
    for holder in (config, config.get("text_config") or {}):
        if holder.get("vocab_size"):
            return int(holder["vocab_size"])
    tokenizer = _object(files, NAMES[0])
    known = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = known.values() if isinstance(known, dict) else range(len(known))
    added = (entry.get("id", 0) for entry in tokenizer.get("added_tokens") or ())
    return max((int(id) for id in (*ids, *added)), default=-1) + 1
