"""What routers and operators ask of the worker's process.

The native port serves gRPC and owns the sessions; what it cannot answer by
itself comes here as events, in order, on one thread. Nothing here is done a
token or a step.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kvmesh._router import (
    Ended,
    EndsTold,
    EngineEnded,
    HandOverAsked,
    InfoWanted,
    Placed,
    RoleChanged,
    SnapshotWanted,
    StopAsked,
    WorkerPort,
)
from kvmesh.engine.contract import AttemptId, Engine, Placement, Stage
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh._router import PortEvent

_log = logging.getLogger(__name__)

_WAIT_S = 60.0
"""Longest wait for events; the port ends it when it is closed."""

_SNAPSHOT_NICENESS = 10
"""A router that knows nothing has no hurry; the streams beside it have."""


_ORDINARY_ENDS = frozenset({"finished", "handed_off", "cancelled"})


def _log_ends(told: EndsTold) -> None:
    """One line an attempt that has ended; nothing of prompt or output."""
    for session, generation, owner, attempt, stage, end, why in told.ends:
        level = logging.DEBUG if end in _ORDINARY_ENDS else logging.INFO
        if end == "failed":
            level = logging.WARNING
        _log.log(
            level,
            "attempt ended generation=%s owner=%d attempt=%d stage=%s end=%s session=%s why=%r",
            generation.hex(), owner, attempt, stage.lower() or "-", end, session, why,
        )  # fmt: skip


class WorkerService:
    """Brings the port and the engine together."""

    def __init__(self, engine: Engine, port: WorkerPort, record: wire.WorkerRecord) -> None:
        """`record` gets the role in force."""
        self.record = record
        self.on_stop: Callable[[float | None], object] = lambda grace_s: None
        """Drain with `stop` was called; with the grace in seconds, where it names one."""
        self.on_role: Callable[[], object] = lambda: None
        """`record.role` has changed."""
        self.on_engine_end: Callable[[], object] = lambda: None
        """The engine ended by itself."""
        self._engine = engine
        self._port = port
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)
        self._snapshots: set[threading.Thread] = set()

    def start(self) -> None:
        """Begins to take events."""
        self._thread.start()

    def join(self) -> None:
        """Waits for its threads to end, which they do once the port is closed."""
        if self._thread.ident is not None:
            self._thread.join()
        for thread in list(self._snapshots):
            thread.join()

    # -- events ------------------------------------------------------------

    def _run(self) -> None:
        while (events := self._port.wait(_WAIT_S)) is not None:
            for event in events:
                try:
                    self._take(event)
                except Exception:
                    # One that nobody thought of harms no other.
                    _log.exception("event failed kind=%s", type(event).__name__)

    def _take(self, event: PortEvent) -> None:
        match event:
            case Placed():
                self._place(event)
            case Ended():
                self._engine.cancel([AttemptId(*attempt) for attempt in event.attempts])
            case HandOverAsked():
                command = wire.HandOver.FromString(event.command)
                attempt = AttemptId(command.generation, command.owner, command.attempt)
                self._engine.hand_over(
                    attempt, command.next_attempt, command.hand_off, command.next_index
                )
            case SnapshotWanted():
                self._begin_snapshot(event.session)
            case InfoWanted():
                self._port.answer_info(event.call, self._engine.residue().SerializeToString())
            case StopAsked():
                _log.info("drain stop=True running=%d", self._port.running())
                self.on_stop(event.grace_s)
            case RoleChanged():
                self.record.role = cast("wire.Role", event.role)
                _log.info("role changed role=%s", wire.Role.Name(self.record.role))
                self.on_role()
            case EndsTold():
                _log_ends(event)
            case EngineEnded():
                self.on_engine_end()

    def _place(self, event: Placed) -> None:
        place = wire.Place.FromString(event.place)
        self._engine.submit(
            Placement(
                id=AttemptId(place.generation, place.owner, place.attempt),
                router=event.session,
                stage=Stage(place.stage),
                continuation=place.continuation,
                prompt_ids=event.prompt_ids,
                received_at=time.monotonic() - event.age_s,
                hand_off=place.hand_off if place.HasField("hand_off") else None,
                prefix_from=place.prefix_from if place.HasField("prefix_from") else None,
                request_id=place.request_id,
                traceparent=place.traceparent,
                alone=place.alone,
                trace=place.trace,
            )
        )

    # -- snapshots ---------------------------------------------------------

    def _begin_snapshot(self, session: str) -> None:
        """One thread a snapshot: it waits for its router, and for nobody else's."""
        thread = threading.Thread(
            target=self._snapshot, args=(session,), name="snapshot", daemon=True
        )
        self._snapshots.add(thread)
        thread.start()

    def _snapshot(self, session: str) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SNAPSHOT_NICENESS)
            if self._port.begin_snapshot(session):
                for part in self._engine.snapshot():
                    if not self._port.add_snapshot(session, part):
                        return
                self._port.add_snapshot(session, None)
        except Exception:
            _log.exception("snapshot failed session=%s", session)
            self._port.fail_snapshot(session)
        finally:
            self._snapshots.discard(threading.current_thread())
