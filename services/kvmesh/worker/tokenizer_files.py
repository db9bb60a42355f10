"""The files that a router needs to turn text into tokens and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmesh.v1 import worker_pb2 as wire

NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""In the order of the digest. The first is required."""

PART_BYTES = 1024 * 1024


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

    def messages(self, known_digest: str) -> Iterator[wire.GetTokenizerResponse]:
        """The answer to GetTokenizer: header, then bytes unless they are known."""
        header = wire.TokenizerHeader(
            digest=self.digest,
            files=[
                wire.TokenizerFile(name=name, size=len(content))
                for name, content in self.files.items()
            ],
        )
        yield wire.GetTokenizerResponse(header=header)
        if known_digest == self.digest:
            return
        for content in self.files.values():
            for begin in range(0, len(content), PART_BYTES):
                yield wire.GetTokenizerResponse(data=content[begin : begin + PART_BYTES])
