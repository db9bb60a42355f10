"""A worker's life: load, serve, register; drain and end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import kvmesh
from kvmesh._router import WorkerPort, WorkerRegistration
from kvmesh.roles import role_number
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.engines import BuiltEngine, build_engine
from kvmesh.worker.service import WorkerService
from kvmesh.worker.settings import WorkerSettings, split_address

_log = logging.getLogger(__name__)

_LINGER_S = 1.0
"""Time that routers have, at the end, to take what was said last."""


def main(settings: WorkerSettings, announce: Callable[[str], None] = print) -> int:
    """Runs a worker until it is told to stop. Returns the exit status."""
    sys.setswitchinterval(settings.switch_interval_ms / 1000)
    return asyncio.run(serve(settings, announce))


async def serve(settings: WorkerSettings, announce: Callable[[str], None]) -> int:
    """As `main`, inside a running loop. `announce` gets a line a milestone.

    The loop waits for signals and the end; gRPC is served by the native port,
    and the engine runs on its own thread.
    """
    told = _Told(settings.grace_s)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.stop)

    worker_id = settings.resolved_worker_id()
    incarnation = secrets.randbits(63) | 1
    started = time.monotonic()
    announce(f"worker {worker_id}: loading {settings.model} with engine {settings.engine}")
    built = await asyncio.to_thread(build_engine, settings, worker_id, incarnation, announce)
    engine = built.engine
    port = _port(settings)
    record = _record(settings, built, worker_id, incarnation, port.port)
    service = WorkerService(engine, port, record)
    service.on_stop = lambda grace_s: loop.call_soon_threadsafe(told.stop, grace_s)
    service.on_role = lambda: loop.call_soon_threadsafe(told.role.set)
    service.on_engine_end = lambda: loop.call_soon_threadsafe(told.fail)
    try:
        await asyncio.to_thread(engine.start, port)
        record.step_model.CopyFrom(engine.step_model())
        record.capabilities.CopyFrom(engine.capabilities())
        service.start()
        port.serve(
            record.SerializeToString(), list(built.tokenizer.files.items()), built.tokenizer.digest
        )
        announce(
            f"worker {worker_id}: serving {record.model.name} on {record.address} "
            f"after {time.monotonic() - started:.1f} s"
        )
        with ExitStack() as stack:
            registration = await asyncio.to_thread(_register, settings, record, stack)
            roles = asyncio.create_task(_follow_role(record, told, registration), name="role")
            try:
                await asyncio.wait([told.stopped, roles], return_when=asyncio.FIRST_COMPLETED)
                # A role that cannot be written is a failure, as an engine that ended.
                await (roles if roles.done() else told.stopped)
                port.begin_stop()
                announce(f"worker {worker_id}: draining, {port.running()} running")
                # The streams that still run need their tokens until the grace ends.
                if not await asyncio.to_thread(port.wait_idle, told.grace_s):
                    _log.warning("grace ended running=%d", port.running())
                    port.give_back()
            finally:
                roles.cancel()
                await asyncio.gather(roles, return_exceptions=True)
    finally:
        await asyncio.to_thread(port.close, _LINGER_S)
        await engine.close()
        await asyncio.to_thread(service.join)
        announce(f"worker {worker_id}: stopped")
    return 0


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
            self.stopped.set_exception(RuntimeError("the engine has ended"))


async def _follow_role(
    record: wire.WorkerRecord, told: _Told, registration: WorkerRegistration | None
) -> None:
    """Writes a changed role to the registry."""
    while True:
        await told.role.wait()
        told.role.clear()
        if registration is not None:
            await asyncio.to_thread(registration.update, record.SerializeToString())


def _port(settings: WorkerSettings) -> WorkerPort:
    return WorkerPort(
        settings.listen,
        step_lane_bytes=settings.step_lane_bytes,
        step_lane_age_s=settings.step_lane_age_s,
        cache_ring_events=settings.cache_ring_events,
        cache_coalesce_ms=settings.cache_coalesce_ms,
        snapshot_interval_ms=settings.snapshot_interval_ms,
        load_interval_ms=settings.load_interval_ms,
        load_coalesce_ms=settings.load_coalesce_ms,
        load_delay_ms=settings.load_delay_ms,
    )


def _register(
    settings: WorkerSettings, record: wire.WorkerRecord, stack: ExitStack
) -> WorkerRegistration | None:
    if not settings.etcd:
        return None
    registration = WorkerRegistration(
        list(settings.etcd), settings.cluster, record.SerializeToString(), settings.lease_ttl_s
    )
    stack.callback(registration.close)
    return registration


def _record(
    settings: WorkerSettings, built: BuiltEngine, worker_id: str, incarnation: int, port: int
) -> wire.WorkerRecord:
    host, _ = split_address("listen", settings.listen)
    host = settings.advertise_host or host
    model = wire.ModelRecord()
    model.CopyFrom(built.model)
    model.tokenizer_digest = built.tokenizer.digest
    if settings.served_name:
        model.name = settings.served_name
    return wire.WorkerRecord(
        worker_id=worker_id,
        incarnation=incarnation,
        address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        transfer_address=built.engine.transfer_address,
        role=role_number(settings.role),
        model=model,
        capabilities=built.engine.capabilities(),
        version=kvmesh.__version__,
        labels=settings.labels,
    )
