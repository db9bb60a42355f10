"""Models: where they come from and where they are kept."""

from kvmesh.models.cancellation import Cancellation, LoadCancelledError
from kvmesh.models.config import SUPPORTED_ARCHITECTURES, ModelConfig, RopeConfig, load_config
from kvmesh.models.digest import model_digest, tokenizer_digest, tokenizer_files
from kvmesh.models.ends import END_FILES, NO_END, end_of_text_ids, end_of_text_ids_of
from kvmesh.models.errors import (
    ChecksumError,
    ModelError,
    ModelNotFoundError,
    SourceUnreachableError,
    UnsupportedModelError,
)
from kvmesh.models.progress import Progress, silent
from kvmesh.models.store import (
    CachedModel,
    cache_folder,
    check,
    list_cached,
    pull,
    resolve,
    verify,
)

__all__ = [
    "END_FILES",
    "NO_END",
    "SUPPORTED_ARCHITECTURES",
    "CachedModel",
    "Cancellation",
    "ChecksumError",
    "LoadCancelledError",
    "ModelConfig",
    "ModelError",
    "ModelNotFoundError",
    "Progress",
    "RopeConfig",
    "SourceUnreachableError",
    "UnsupportedModelError",
    "cache_folder",
    "check",
    "end_of_text_ids",
    "end_of_text_ids_of",
    "list_cached",
    "load_config",
    "model_digest",
    "pull",
    "resolve",
    "silent",
    "tokenizer_digest",
    "tokenizer_files",
    "verify",
]
