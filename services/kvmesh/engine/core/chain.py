"""Chain values that name cached blocks to routers (DESIGN 3.8, hash scheme 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmesh._router import chain_root, chain_values


class Chain:
    """Chain values of one model."""

    SCHEME = 1
    """wire: Capabilities.hash_scheme."""

    def __init__(self, model_digest: str, adapters: Mapping[str, str]) -> None:
        """`adapters`: digests by name; the base model is the name "", digest ""."""
        self._digest = model_digest
        self._adapters = adapters

    def root(self, adapter: str, cache_salt: str) -> int:
        """Parent value of first blocks in a namespace.

        Routers know adapters by digest (proto/HASHES.md): names may mean
        something else on another worker. A name that the model does not have
        can only be asked for by a peer, and stands for itself.
        """
        return chain_root(self._digest, self._adapters.get(adapter, adapter), cache_salt)

    def hashes(self, parent: int, ids: bytes) -> Sequence[int]:
        """Value after each whole unit of 16 ids; these as u32, little-endian."""
        return chain_values(parent, ids)
