"""What a worker shows others of its cluster, and asks of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kvmesh._router import ClusterToken, PeerTls
from kvmesh.worker.settings import SettingError, WorkerSettings


def cluster_token(settings: WorkerSettings) -> ClusterToken | None:
    """The cluster's token, one object for all that show it. Raises SettingError."""
    return _token(settings.cluster_token_file) if settings.cluster_token_file else None


def peer_tls(settings: WorkerSettings, worker_id: str) -> PeerTls | None:
    """The worker's TLS, one object for both of its ports. Raises SettingError."""
    if not settings.tls_cert:
        return None
    certificate, key, ca = map(_path, (settings.tls_cert, settings.tls_key, settings.tls_ca))
    return _tls(certificate, key, ca, settings.cluster, worker_id)


@cache
def _token(file: str) -> ClusterToken:
    try:
        return ClusterToken(_path(file))
    except ValueError as error:
        raise SettingError(str(error)) from error


@cache
def _tls(certificate: str, key: str, ca: str, cluster: str, worker_id: str) -> PeerTls:
    try:
        return PeerTls(certificate, key, ca, cluster, worker_id)
    except ValueError as error:
        raise SettingError(str(error)) from error


def _path(file: str) -> str:
    return str(Path(file).expanduser())
