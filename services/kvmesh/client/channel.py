"""How both clients connect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import grpc

Metadata = tuple[tuple[str, str], ...]

# Prompts may be long, answers never are: frames are kept small by the server.
_MAX_SEND_BYTES = 64 * 1024 * 1024

_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_send_message_length", _MAX_SEND_BYTES),
    # A silent prefill may take minutes: keep the path open and notice its end.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
)


def resolve_target(target: str | None) -> str:
    """The target, else KVMESH_ENDPOINT. Raises `ValueError` without either."""
    target = target or os.environ.get("KVMESH_ENDPOINT", "")
    if not target:
        raise ValueError(
            "no target: give Client('host:port') or set KVMESH_ENDPOINT (kvmesh up prints it)"
        )
    return target


def channel_options(target: str, extra: Sequence[tuple[str, Any]] | None) -> list[tuple[str, Any]]:
    """Our channel options, then the caller's, which win."""
    options = [*_OPTIONS, *(extra or ())]
    if "," in target:
        # gRPC makes the calls' :authority of the target, with its commas escaped, and
        # HTTP/2 servers in Rust take no percent sign there (docs/protocols.md, etcd).
        options.insert(0, ("grpc.default_authority", "kvmesh"))
    return options


def call_metadata(
    token: str | None, request_id: str | None, extra: Sequence[tuple[str, str]] | None
) -> Metadata:
    """Metadata of one call."""
    metadata: list[tuple[str, str]] = list(extra or ())
    if token:
        metadata.append(("authorization", f"Bearer {token}"))
    if request_id:
        metadata.append(("x-request-id", request_id))
    return tuple(metadata)


def credentials_for(
    credentials: grpc.ChannelCredentials | bool | None,
) -> grpc.ChannelCredentials | None:
    """TLS credentials: given ones, the system's for True, none for None."""
    if credentials is True:
        return grpc.ssl_channel_credentials()
    return credentials or None
