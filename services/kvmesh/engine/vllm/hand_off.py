"""vLLM's kv_transfer_params as the opaque bytes that a router carries.

JSON in UTF-8. A list of blocks as long as a very long prompt's may not fit the
64 KiB that a hand-off may have: then the JSON is compressed by zlib, which its
first byte tells (JSON of an object begins with "{", zlib's header never does).
"""

from __future__ import annotations

import json
import zlib
from typing import Any

MOST_BYTES = 64 * 1024
"""worker.proto, EngineHandOff.payload."""
_PLAIN_BYTES = 16 * 1024
_MOST_JSON_BYTES = 4 * 1024 * 1024
"""Most that is unpacked: a payload comes from another machine."""

PREFILL: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What the prefill stage asks a connector for."""


class HandOffError(ValueError):
    """A hand-off cannot be written or read. The text is for people."""


def pack(params: dict[str, Any] | None) -> bytes:
    """Bytes for the router. None: the connector needs nothing told. Raises HandOffError."""
    try:
        payload = json.dumps(params or {}, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise HandOffError(f"the connector's parameters are no JSON: {error}") from error
    if len(payload) > _PLAIN_BYTES:
        payload = zlib.compress(payload, 6)
    if len(payload) > MOST_BYTES:
        raise HandOffError(f"the hand-off has {len(payload)} bytes; allowed are {MOST_BYTES}")
    return payload


def unpack(payload: bytes) -> dict[str, Any] | None:
    """The connector's parameters; None: it needs none. Raises HandOffError."""
    if not payload:
        return None
    try:
        if payload[:1] != b"{":
            unpacker = zlib.decompressobj()
            payload = unpacker.decompress(payload, _MOST_JSON_BYTES)
            if not unpacker.eof:
                raise HandOffError("the hand-off is too long or cut off")
        params = json.loads(payload)
    except (ValueError, zlib.error) as error:
        raise HandOffError(f"the hand-off cannot be read: {error}") from error
    if not isinstance(params, dict):
        raise HandOffError("the hand-off is no JSON object")
    return params or None
