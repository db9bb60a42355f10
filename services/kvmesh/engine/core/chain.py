"""Chain values that name cached blocks to routers (DESIGN 3.8, hash scheme 1)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh._router import chain_root, chain_values


class Chain:
    """Chain values of one model."""

    SCHEME = 1
    """wire: Capabilities.hash_scheme."""

    def __init__(self, model_digest: str) -> None:
        self._digest = model_digest

    def root(self, adapter: str, cache_salt: str) -> int:
        """Parent value of first blocks in a namespace."""
        return chain_root(self._digest, adapter, cache_salt)

    def hashes(self, parent: int, ids: bytes) -> Sequence[int]:
        """Value after each whole unit of 16 ids; these as u32, little-endian."""
        return chain_values(parent, ids)
