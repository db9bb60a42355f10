"""The files that a router needs to turn text into tokens and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""In the order of the digest. The first is required."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Tokeniser files and their digest (worker.proto, TokenizerHeader)."""

    files: Mapping[str, bytes]
    digest: str

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> TokenizerFiles:
        """From contents by name."""
        ordered = {name: files[name] for name in NAMES if name in files}
        digest = hashlib.sha256()
        for name, content in ordered.items():
            digest.update(name.encode() + b"\0" + len(content).to_bytes(8, "little"))
            digest.update(content)
        return cls(ordered, digest.hexdigest())

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """From a model's folder. Raises `FileNotFoundError` without tokenizer.json."""
        if not (folder / NAMES[0]).is_file():
            raise FileNotFoundError(f"{folder} has no {NAMES[0]}: routers could not tokenise")
        found = {name: folder / name for name in NAMES}
        return cls.of({n: path.read_bytes() for n, path in found.items() if path.is_file()})
