"""A worker's life: answer, load, warm up, serve, register; drain and end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import kvmesh
from kvmesh._router import PeerTls, WorkerPort, WorkerRegistration
from kvmesh.engine.contract import Engine
from kvmesh.roles import role_number
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.engines import BuiltEngine, build_engine
from kvmesh.worker.loading import Loading, StoppedError
from kvmesh.worker.registration import etcd_access, register, tell_changes
from kvmesh.worker.service import WorkerService
from kvmesh.worker.settings import WorkerSettings, split_address
from kvmesh.worker.trust import cluster_token, peer_tls

_log = logging.getLogger(__name__)

_LOOK_S = 0.005
"""Between two looks at transfers that are about to end."""

_LINGER_S = 1.0
"""Time that routers have, at the end, to take what was said last."""


class EngineEndedError(RuntimeError):
    """The engine ended by itself."""


def main(settings: WorkerSettings, announce: Callable[[str], None] = print) -> int:
    """Runs a worker until it is told to stop. Returns the exit status."""
    sys.setswitchinterval(settings.switch_interval)
    loading = Loading()
    status = asyncio.run(serve(settings, announce, loading))
    loading.leave(status)
    return status


async def serve(
    settings: WorkerSettings, announce: Callable[[str], None], loading: Loading | None = None
) -> int:
    """As `main`, inside a running loop. `announce` gets a line a milestone. Where it is told
    to stop before it serves, `loading` tells whether it left a thread at work.

    The loop waits for signals and the end; gRPC is served by the native port,
    and the engine runs on its own thread.
    """
    told, loading = _Told(settings.grace), loading or Loading()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.stop)

    access = etcd_access(settings)
    worker_id = settings.resolved_worker_id()
    incarnation = secrets.randbits(63) | 1
    started = time.monotonic()
    announce(f"worker {worker_id}: loading {settings.model} with engine {settings.engine}")
    tls = peer_tls(settings, worker_id)
    port = _port(settings, tls)
    record = _record(settings, worker_id, incarnation, port.port)
    service: WorkerService | None = None
    engine: Engine | None = None
    try:
        # Health answers from the first moment on; nothing of it waits for the model.
        port.load(record.SerializeToString())
        announce(f"worker {worker_id}: answering health on {record.address}")
        built = await loading.run(
            told.stopped,
            partial(build_engine, settings, worker_id, incarnation, announce, loading.cancellation),
        )
        engine = built.engine
        _complete(record, settings, built)
        tokenizer = list(built.tokenizer.files.items()), built.tokenizer.digest
        port.warm_up(record.SerializeToString(), *tokenizer)
        announce(f"worker {worker_id}: warming up")
        warming = time.monotonic()
        await loading.run(told.stopped, partial(engine.start, port))
        announce(f"worker {worker_id}: warmed up in {time.monotonic() - warming:.1f} s")
        record.step_model.CopyFrom(engine.step_model())
        record.capabilities.CopyFrom(engine.capabilities())
        port.serve(record.SerializeToString(), *tokenizer)
        service = WorkerService(engine, port, record)
        service.on_stop = lambda grace_s: loop.call_soon_threadsafe(told.stop, grace_s)
        service.on_role = lambda: loop.call_soon_threadsafe(told.role.set)
        service.on_engine_end = lambda: loop.call_soon_threadsafe(told.fail)
        service.start()
        announce(
            f"worker {worker_id}: serving {record.model.name} on {record.address} "
            f"after {time.monotonic() - started:.1f} s"
        )
        with ExitStack() as stack:
            registration = await asyncio.to_thread(register, settings, access, tls, record, stack)
            telling = asyncio.create_task(tell_changes(registration, settings), name="tell")
            await _until_told(record, told, registration)
            port.begin_stop()
            announce(f"worker {worker_id}: draining, {port.running()} running")
            # The streams that still run need their tokens until the grace ends.
            if not await asyncio.to_thread(port.wait_idle, told.grace_s):
                # A line each follows: which, and why.
                _log.warning("grace ended grace_s=%g running=%d", told.grace_s, port.running())
                port.give_back(told.grace_s)
            await asyncio.to_thread(_wait_moved, engine, settings.transfer_lease)
        await telling
    except StoppedError:
        announce(f"worker {worker_id}: told to stop before it served")
    finally:
        await asyncio.to_thread(port.close, _LINGER_S)
        # What still starts cannot be closed: it ends with the process.
        if engine is not None and not loading.left:
            await engine.close()
        if service is not None:
            await asyncio.to_thread(service.join)
        announce(f"worker {worker_id}: stopped")
    return 0


def _wait_moved(engine: Engine, lease_s: float) -> None:
    """Waits for peers to have the KV that was handed to them: with this process it is gone."""
    ends = time.monotonic() + lease_s
    while engine.residue().transfers and time.monotonic() < ends:
        time.sleep(_LOOK_S)


class _Told:
    """What the worker was told to do. Used by the event loop alone."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.role = asyncio.Event()
        self.stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def stop(self, grace_s: float | None = None) -> None:
        """A signal, or Drain with `stop`."""
        if grace_s is not None:
            self.grace_s = grace_s
        if not self.stopped.done():
            self.stopped.set_result(None)

    def fail(self) -> None:
        """The engine ended by itself."""
        if not self.stopped.done():
            self.stopped.set_exception(EngineEndedError("the engine has ended"))


async def _until_told(
    record: wire.WorkerRecord, told: _Told, registration: WorkerRegistration | None
) -> None:
    """Waits for the end, and keeps the registry up to date meanwhile."""
    roles = asyncio.create_task(_follow_role(record, told, registration), name="role")
    try:
        await asyncio.wait([told.stopped, roles], return_when=asyncio.FIRST_COMPLETED)
        # A role that cannot be written is a failure, as an engine that ended.
        await (roles if roles.done() else told.stopped)
    finally:
        roles.cancel()
        await asyncio.gather(roles, return_exceptions=True)


async def _follow_role(
    record: wire.WorkerRecord, told: _Told, registration: WorkerRegistration | None
) -> None:
    """Writes a changed role to the registry."""
    while True:
        await told.role.wait()
        told.role.clear()
        if registration is not None:
            await asyncio.to_thread(registration.update, record.SerializeToString())


def _port(settings: WorkerSettings, tls: PeerTls | None) -> WorkerPort:
    return WorkerPort(
        settings.listen,
        step_lane_bytes=settings.step_lane_bytes,
        step_lane_age_s=settings.step_lane_age,
        cache_ring_events=settings.cache_ring_events,
        cache_coalesce_ms=settings.cache_coalesce * 1000,
        snapshot_interval_ms=settings.snapshot_interval * 1000,
        load_interval_ms=settings.load_interval * 1000,
        load_coalesce_ms=settings.load_coalesce * 1000,
        keep_alive_interval_s=settings.keep_alive_interval,
        keep_alive_timeout_s=settings.keep_alive_timeout,
        grace_s=settings.grace,
        tell_all_ends=_log.isEnabledFor(logging.DEBUG),
        load_delay_ms=settings.load_delay * 1000,
        replay_bytes=settings.replay_bytes,
        orphan_ttl_s=settings.orphan_ttl,
        resume_bytes=settings.resume_bytes,
        token=cluster_token(settings),
        tls=tls,
    )


def _record(
    settings: WorkerSettings, worker_id: str, incarnation: int, port: int
) -> wire.WorkerRecord:
    """What is known before the model is loaded."""
    host, _ = split_address("listen", settings.listen)
    host = settings.advertise_host or host
    return wire.WorkerRecord(
        worker_id=worker_id,
        incarnation=incarnation,
        address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        role=role_number(settings.role),
        version=kvmesh.__version__,
        labels=settings.labels,
    )


def _complete(record: wire.WorkerRecord, settings: WorkerSettings, built: BuiltEngine) -> None:
    """Adds what the loaded model says."""
    record.transfer_address = built.engine.transfer_address
    record.model.CopyFrom(built.model)
    record.model.tokenizer_digest = built.tokenizer.digest
    if settings.served_name:
        record.model.name = settings.served_name
    record.capabilities.CopyFrom(built.engine.capabilities())
