"""A worker's life: load, serve, register; drain and end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import kvmesh
from kvmesh._router import WorkerRegistration
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.engines import BuiltEngine, build_engine
from kvmesh.worker.service import SERVICE, WorkerService
from kvmesh.worker.settings import ROLES, WorkerSettings, split_address

_log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # Routers ping every 10 s, also in a silent prefill of minutes.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


def main(settings: WorkerSettings, announce: Callable[[str], None] = print) -> int:
    """Runs a worker until it is told to stop. Returns the exit status."""
    sys.setswitchinterval(settings.switch_interval_ms / 1000)
    return asyncio.run(serve(settings, announce))


async def serve(settings: WorkerSettings, announce: Callable[[str], None]) -> int:
    """As `main`, inside a running loop. `announce` gets a line a milestone."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    worker_id = settings.resolved_worker_id()
    incarnation = secrets.randbits(63) | 1
    started = time.monotonic()
    announce(f"worker {worker_id}: loading {settings.model} with engine {settings.engine}")
    built = await asyncio.to_thread(build_engine, settings, worker_id, incarnation, announce)
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    port = server.add_insecure_port(settings.listen)
    record = _record(settings, built, worker_id, incarnation, port)
    service = WorkerService(built.engine, record, built.tokenizer, settings)
    status = _add_services(server, service)
    try:
        await asyncio.to_thread(built.engine.start)
        record.step_model.CopyFrom(built.engine.step_model())
        record.capabilities.CopyFrom(built.engine.capabilities())
        await server.start()
        await status.set("", health_pb2.HealthCheckResponse.SERVING)
        await status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        announce(
            f"worker {worker_id}: serving {record.model.name} on {record.address} "
            f"after {time.monotonic() - started:.1f} s"
        )
        with ExitStack() as stack:
            registration = await asyncio.to_thread(_register, settings, record, stack)
            async with _tasks(service, registration) as failed:
                await _until_told(stop, service, failed)
                await status.enter_graceful_shutdown()
                announce(f"worker {worker_id}: draining, {service.running()} running")
                # The streams that still run need their tokens until the grace ends.
                await service.stop(service.stop_grace_s)
    finally:
        await server.stop(grace=1.0)
        await built.engine.close()
        announce(f"worker {worker_id}: stopped")
    return 0


@asynccontextmanager
async def _tasks(
    service: WorkerService, registration: WorkerRegistration | None
) -> AsyncIterator[asyncio.Future[None]]:
    """Runs the worker's tasks; the future fails when one of them ends."""
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not failed.done():
            # None of these tasks ends by itself: say what went wrong.
            failed.set_exception(
                task.exception() or RuntimeError(f"the worker's task {task.get_name()} ended")
            )

    tasks = [
        asyncio.create_task(service.distribute_outputs(), name="outputs"),
        asyncio.create_task(service.distribute_events(), name="events"),
        asyncio.create_task(service.report_load(), name="load"),
        asyncio.create_task(_follow_role(service, registration), name="role"),
    ]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield failed
    finally:
        for task in tasks:
            task.remove_done_callback(ended)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_told(
    stop: asyncio.Event, service: WorkerService, failed: asyncio.Future[None]
) -> None:
    """Waits for a signal or a Drain that stops; raises what a task raised."""
    waits: list[asyncio.Future[Any]] = [
        asyncio.create_task(stop.wait(), name="signal"),
        asyncio.create_task(service.stopping.wait(), name="drain"),
    ]
    try:
        await asyncio.wait([*waits, failed], return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            await failed
    finally:
        for task in waits:
            task.cancel()


async def _follow_role(service: WorkerService, registration: WorkerRegistration | None) -> None:
    """Writes a changed role to the registry."""
    while True:
        await service.role_changed.wait()
        service.role_changed.clear()
        if registration is not None:
            await asyncio.to_thread(registration.update, service.record.SerializeToString())


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


def _add_services(server: grpc.aio.Server, service: WorkerService) -> health.aio.HealthServicer:
    server.add_generic_rpc_handlers((service.handlers(),))
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    return status


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
        role=ROLES[settings.role],
        model=model,
        capabilities=built.engine.capabilities(),
        version=kvmesh.__version__,
        labels=settings.labels,
    )
