"""Fetching a model from a Hugging Face hub, with the standard library alone.

Every file is checked against what the hub's API says of it: SHA-256 of large
files, git's blob id (SHA-1 over a header and the content) of small ones.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvmesh.models.cancellation import Cancellation
from kvmesh.models.config import parse_config
from kvmesh.models.errors import ChecksumError, ModelNotFoundError, SourceUnreachableError
from kvmesh.models.progress import Progress

_DEFAULT_ENDPOINT = "https://huggingface.co"
_CONNECT_TIMEOUT_S = 5.0
"""A hub that is not there should cost seconds, since there may be a second source."""
_CHUNK = 1 << 20
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


@dataclass(frozen=True, slots=True)
class _Remote:
    name: str
    size: int
    sha256: str | None
    blob_id: str | None


def fetch(repository: str, target: Path, progress: Progress, cancellation: Cancellation) -> str:
    """Downloads config, tokeniser and safetensors of `repository` into `target`.

    Returns the commit that was taken. The architecture is checked before the
    weights are fetched. Honours HF_ENDPOINT and HF_TOKEN.
    """
    listing = _get_json(
        f"api/models/{repository}/revision/main?blobs=true", repository, cancellation
    )
    commit = str(listing["sha"])
    remotes = [_remote(entry) for entry in listing.get("siblings", [])]
    small = [remote for remote in remotes if remote.name in _SMALL_FILES]
    names = {remote.name for remote in small}
    for needed in ("config.json", "tokenizer.json"):
        if needed not in names:
            raise ModelNotFoundError(f"{repository} has no {needed}")
    for remote in small:
        _download(repository, commit, remote, target, progress, cancellation)
    parse_config(json.loads((target / "config.json").read_text(encoding="utf-8")))
    weights = _weights(target, remotes)
    if not weights:
        raise ModelNotFoundError(f"{repository} has no safetensors")
    for remote in weights:
        _download(repository, commit, remote, target, progress, cancellation)
    return commit


def _weights(target: Path, remotes: list[_Remote]) -> list[_Remote]:
    """The shards of the index, or the single file; not other variants beside them."""
    wanted = {"model.safetensors"}
    index = target / "model.safetensors.index.json"
    if index.exists():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [remote for remote in remotes if remote.name in wanted and "/" not in remote.name]


def _remote(entry: dict[str, Any]) -> _Remote:
    lfs = entry.get("lfs") or {}
    return _Remote(
        name=entry["rfilename"],
        size=int(entry.get("size") or 0),
        sha256=lfs.get("sha256"),
        blob_id=entry.get("blobId"),
    )


@contextmanager
def _open(
    path: str, repository: str, cancellation: Cancellation
) -> Iterator[http.client.HTTPResponse]:
    endpoint = os.environ.get("HF_ENDPOINT", _DEFAULT_ENDPOINT).rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{path}")
    token = os.environ.get("HF_TOKEN")
    if token:
        # Not sent on to the host that a redirect names.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with ExitStack() as held:
        watched = _Watched(cancellation, held)
        opener = urllib.request.build_opener(_Plain(watched), _Secure(watched))
        try:
            response = held.enter_context(opener.open(request, timeout=_CONNECT_TIMEOUT_S))
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise ModelNotFoundError(
                    f"{repository} is not on the hub, or needs HF_TOKEN (HTTP {error.code})"
                ) from error
            raise SourceUnreachableError(f"the hub answers HTTP {error.code}") from error
        except OSError as error:
            raise SourceUnreachableError(f"the hub cannot be reached: {error}") from error
        yield response


def _get_json(path: str, repository: str, cancellation: Cancellation) -> dict[str, Any]:
    with _open(path, repository, cancellation) as response:
        try:
            content = json.load(response)
        except (ValueError, OSError, http.client.HTTPException) as error:
            raise SourceUnreachableError(f"the hub's answer cannot be read: {error}") from error
    if not isinstance(content, dict) or "sha" not in content:
        raise SourceUnreachableError("the hub's answer has another form than expected")
    return content


def _download(
    repository: str,
    commit: str,
    remote: _Remote,
    target: Path,
    progress: Progress,
    cancellation: Cancellation,
) -> None:
    path = f"{repository}/resolve/{commit}/{urllib.parse.quote(remote.name)}"
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    done = 0
    step = f"download {remote.name}"
    progress(step, 0, remote.size)
    with (
        _open(path, repository, cancellation) as response,
        (target / remote.name).open("wb") as file,
    ):
        try:
            while piece := response.read(_CHUNK):
                file.write(piece)
                sha256.update(piece)
                blob.update(piece)
                done += len(piece)
                progress(step, done, remote.size)
        except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            raise SourceUnreachableError(f"download of {remote.name} broke: {error}") from error
    expected = remote.sha256 or remote.blob_id
    found = sha256.hexdigest() if remote.sha256 else blob.hexdigest()
    if expected is not None and found != expected:
        raise ChecksumError(f"{remote.name} of {repository}: expected {expected}, found {found}")


class _Watched:
    """Has sockets end when their fetch is given up: a thread may wait there for the next byte."""

    def __init__(self, cancellation: Cancellation, held: ExitStack) -> None:
        self._cancellation = cancellation
        self._held = held

    def watch(self, of: socket.socket) -> None:
        """From its connect on, before TLS: that wraps it, and the copy stays what it is."""
        copy = self._held.enter_context(socket.socket(fileno=os.dup(of.fileno())))
        self._held.enter_context(self._cancellation.breaks(partial(_end, copy)))


def _end(connection: socket.socket) -> None:
    # The other side may have been faster.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    watched: _Watched

    def connect(self) -> None:
        super().connect()
        self.watched.watch(self.sock)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """TLS begins where the connection above has done its part."""


def _watching(kind: type[_Connection], watched: _Watched) -> Callable[..., _Connection]:
    """Makes connections of a kind, as urllib asks for them."""

    def connection(host: str, **options: Any) -> _Connection:
        made = kind(host, **options)
        made.watched = watched
        return made

    return connection


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self._watched = watched

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_watching(_Connection, self._watched), request)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self._watched = watched

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_watching(_SecureConnection, self._watched), request)
