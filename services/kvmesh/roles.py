"""Names of roles, as people write them and as the wire has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmesh.v1 import worker_pb2 as wire

ROLES = ("prefill", "decode", "both")
"""What a worker may take."""


def role_name(role: wire.Role) -> str:
    """A role as people write it."""
    from kvmesh.v1 import worker_pb2 as wire

    return wire.Role.Name(role).removeprefix("ROLE_").lower()


def role_number(name: str) -> wire.Role:
    """A role as the wire has it. Raises KeyError for another name."""
    from kvmesh.v1 import worker_pb2 as wire

    return {"prefill": wire.ROLE_PREFILL, "decode": wire.ROLE_DECODE, "both": wire.ROLE_BOTH}[name]
