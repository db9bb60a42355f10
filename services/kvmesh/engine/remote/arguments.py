"""What `kvmesh attach` is told of a server."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvmesh.engine.remote.server import SaltedPrompts
from kvmesh.setting_values import ValueNotAllowedError, boolean
from kvmesh.worker.settings import SettingError

SCHEMES = {
    "vllm": "grpc",
    "grpc": "grpc",
    "vllms": "grpcs",
    "grpcs": "grpcs",
    "http": "http",
    "https": "https",
    "openai+http": "http",
    "openai+https": "https",
}
"""Of a server's address, and what is spoken with it."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and what it speaks."""

    wire: str
    """grpc, grpcs, http or https."""
    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> Address:
        """From "vllm://host:port". Raises SettingError."""
        parts = urlsplit(text)
        try:
            port = parts.port
        except ValueError:
            port = None
        wire = SCHEMES.get(parts.scheme)
        if wire is None or not parts.hostname or port is None or parts.path.strip("/"):
            allowed = ", ".join(f"{scheme}://host:port" for scheme in SCHEMES)
            raise SettingError(f"server is {text!r}; allowed are {allowed}")
        return cls(wire, parts.hostname, port)

    @property
    def speaks_grpc(self) -> bool:
        """Else HTTP."""
        return self.wire.startswith("grpc")

    @property
    def has_tls(self) -> bool:
        """Whether nobody between can read, or answer in its place."""
        return self.wire.endswith("s")

    def __str__(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of the engine `remote`."""

    server: Address
    model: str = ""
    """Which of the server's models, where it has several."""
    tokenizer: Path | None = None
    """Folder with the tokeniser, where the server does not send it."""
    model_digest: str = ""
    """Digest of the model. Empty: made of what the server says."""
    context_length: int = 0
    """In tokens, where the server does not say it."""
    server_key: str = ""
    """Sent as a bearer token."""
    server_ca: bytes = b""
    """Certificates of the authorities that vouch for the server, PEM. Empty: the usual ones."""
    data_parallel_rank: int | None = None
    """Rank to use of a server that has several."""
    seeded: bool = True
    """Whether requests carry seeds."""
    priorities: bool = False
    """Whether the server orders its queue by priority."""
    salted_prompts: SaltedPrompts = SaltedPrompts.REFUSE
    """What becomes of prompts with a cache salt where its API has none."""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Arguments:
        """From text. Raises SettingError."""
        known = set(cls.__dataclass_fields__)
        for key in given:
            if key not in known:
                raise SettingError(
                    f"engine_arguments: {key} is no argument of the engine remote; allowed are "
                    f"{', '.join(sorted(known))}"
                )
        if not given.get("server"):
            raise SettingError("engine remote needs engine_arguments server=vllm://host:port")
        digest = given.get("model_digest", "")
        if digest and not _DIGEST.fullmatch(digest):
            raise SettingError(f"model_digest is {digest!r}; allowed are 64 hexadecimal digits")
        folder = given.get("tokenizer", "")
        rank = given.get("data_parallel_rank", "")
        server, key = Address.of(given["server"]), given.get("server_key", "")
        if key and server.wire == "grpc":
            raise SettingError(
                "server_key is given, which gRPC sends with TLS alone; allowed with it are "
                "vllms://host:port, https:// and http://"
            )
        return cls(
            server,
            model=given.get("model", ""),
            tokenizer=Path(folder).expanduser() if folder else None,
            model_digest=digest,
            context_length=_count("context_length", given.get("context_length") or "0"),
            server_key=key,
            server_ca=_authorities(given.get("server_ca", ""), server),
            data_parallel_rank=_count("data_parallel_rank", rank) if rank else None,
            seeded=_switch("seeded", given.get("seeded", "true")),
            priorities=_switch("priorities", given.get("priorities", "false")),
            salted_prompts=_salted_prompts(given.get("salted_prompts") or "refuse"),
        )


def _count(name: str, text: str) -> int:
    if not text.isdigit():
        raise SettingError(f"{name} is {text!r}; allowed is a number from 0")
    return int(text)


def _authorities(name: str, server: Address) -> bytes:
    if not name:
        return b""
    if not server.has_tls:
        raise SettingError(
            "server_ca is given, and the server has no TLS; allowed with it are vllms://host:port "
            "and https://host:port"
        )
    try:
        found = Path(name).expanduser().read_bytes()
        ssl.create_default_context(cadata=found.decode())
    except (OSError, ValueError) as error:
        # One of ssl is an OSError, too.
        raise SettingError(
            f"server_ca is {name!r}, where no certificate can be read ({error}); allowed is a file "
            "of them, PEM"
        ) from error
    return found


def _salted_prompts(text: str) -> SaltedPrompts:
    try:
        return SaltedPrompts(text)
    except ValueError as error:
        allowed = ", ".join(SaltedPrompts)
        raise SettingError(f"salted_prompts is {text!r}; allowed are {allowed}") from error


def _switch(name: str, text: str) -> bool:
    try:
        return boolean(name, text)
    except ValueNotAllowedError as error:
        raise SettingError(str(error)) from error
