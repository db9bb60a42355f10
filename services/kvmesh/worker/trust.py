"""What a worker shows others of its cluster, and asks of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kvmesh._router import ClusterToken
from kvmesh.worker.settings import SettingError, WorkerSettings


def cluster_token(settings: WorkerSettings) -> ClusterToken | None:
    """The cluster's token, one object for all that show it. Raises SettingError."""
    return _token(settings.cluster_token_file) if settings.cluster_token_file else None


@cache
def _token(file: str) -> ClusterToken:
    try:
        return ClusterToken(str(Path(file).expanduser()))
    except ValueError as error:
        raise SettingError(str(error)) from error
