"""A worker's place in the registry, and what its log says of it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack

from kvmesh._router import PeerTls, WorkerRegistration
from kvmesh.etcd_access import EtcdArguments
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import SettingError, WorkerSettings
from kvmesh.worker.trust import cluster_token

_log = logging.getLogger(__name__)


def etcd_access(settings: WorkerSettings) -> EtcdArguments:
    """Reads the files: a wrong name is told before the model is loaded."""
    try:
        return settings.etcd_access().arguments()
    except ValueError as error:
        raise SettingError(str(error)) from error


def register(
    settings: WorkerSettings,
    access: EtcdArguments,
    tls: PeerTls | None,
    record: wire.WorkerRecord,
    stack: ExitStack,
) -> WorkerRegistration | None:
    """Registers until the stack is closed; None without etcd.

    Returns within seconds, also where etcd is away: it is tried on in the background.
    """
    if not settings.etcd:
        return None
    try:
        registration = WorkerRegistration(
            list(settings.etcd),
            settings.cluster,
            record.SerializeToString(),
            settings.etcd_ttl,
            token=cluster_token(settings),
            tls=tls,
            **access,
        )
    except ValueError as error:
        raise SettingError(str(error)) from error
    stack.callback(registration.close)
    return registration


async def tell_changes(registration: WorkerRegistration | None, settings: WorkerSettings) -> None:
    """Logs each change of the registration, until it is closed.

    Whatever it is, the worker serves on: routers that know it keep it, new ones do not
    find it.
    """
    if registration is None:
        return
    etcd, state, reason, was_away = ",".join(settings.etcd), "", "", False
    while state != "closed":
        state, reason = await asyncio.to_thread(registration.wait_change, state, reason)
        if state == "registered":
            back = " again" if was_away else ""
            _log.info("registered%s etcd=%s cluster=%s", back, etcd, settings.cluster)
        elif state == "registering":
            _log.info("registering etcd=%s cluster=%s", etcd, settings.cluster)
        elif state == "refused":
            _log.error(
                "not registered: setting worker_id is refused: %s; allowed is a name that no "
                "live worker has; tried again every etcd_ttl (%g s)",
                reason, settings.etcd_ttl,
            )  # fmt: skip
        elif state == "away":
            _log.error(
                "not registered: setting etcd is %r, of which none can be had: %s; allowed are "
                "host:port of members of etcd; no new router finds this worker; tried again",
                etcd, reason,
            )  # fmt: skip
        was_away = state in ("away", "refused") or (was_away and state == "registering")
