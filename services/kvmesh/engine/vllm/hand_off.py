"""vLLM's kv_transfer_params as the opaque bytes that a router carries.

JSON in UTF-8. A list of blocks as long as a very long prompt's may not fit the
64 KiB that a hand-off may have: then the JSON is compressed by zlib, which its
first byte tells (JSON of an object begins with "{", zlib's header never does).
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass
from typing import Any

MOST_BYTES = 64 * 1024
"""worker.proto, EngineHandOff.payload."""
NIXL_LEASE_S = 30.0
"""NixlConnector's own default of kv_lease_duration; a server does not tell another."""
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


@dataclass(frozen=True, slots=True)
class HandOff:
    """What decode is told."""

    params: dict[str, Any] | None
    """The connector's; None: it needs nothing told."""
    age_ms: float = 0.0
    """Age of the request when its prompt was computed, since its first router had it."""
    lease_ms: float = 0.0
    """How long the sender keeps the blocks for a receiver that it does not hear. 0: unknown."""

    def left_ms(self, age_ms: float) -> float:
        """How long decode may still take the blocks at this age of the request; later they may
        be gone, or somebody else's. Ages are by the router's clock: no two machines' are compared.

        Half of the lease is left to vLLM, which renews it once it has the request.
        """
        return self.age_ms + self.lease_ms / 2 - age_ms if self.lease_ms else math.inf


def pack(hand_off: HandOff) -> bytes:
    """Bytes for the router. Raises HandOffError."""
    try:
        payload = json.dumps(asdict(hand_off), separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise HandOffError(f"the connector's parameters are no JSON: {error}") from error
    if len(payload) > _PLAIN_BYTES:
        payload = zlib.compress(payload, 6)
    if len(payload) > MOST_BYTES:
        raise HandOffError(f"the hand-off has {len(payload)} bytes; allowed are {MOST_BYTES}")
    return payload


def unpack(payload: bytes) -> HandOff:
    """What prefill said. Raises HandOffError."""
    try:
        if payload[:1] != b"{":
            unpacker = zlib.decompressobj()
            payload = unpacker.decompress(payload, _MOST_JSON_BYTES)
            if not unpacker.eof:
                raise HandOffError("the hand-off is too long or cut off")
        found = json.loads(payload)
        params = found["params"]
        if params is not None and not isinstance(params, dict):
            raise HandOffError("the hand-off's parameters are no JSON object")
        return HandOff(params or None, float(found["age_ms"]), float(found["lease_ms"]))
    except (ValueError, TypeError, KeyError, zlib.error) as error:
        raise HandOffError(f"the hand-off cannot be read: {error}") from error
