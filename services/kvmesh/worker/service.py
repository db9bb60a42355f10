"""The Worker service: sessions with routers over one engine."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from kvmesh.engine.contract import AttemptId, Engine, Placement, RouterStep, Stage
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.cache_log import CacheLog
from kvmesh.worker.session import LaneBounds, Session, SessionClosedError
from kvmesh.worker.settings import WorkerSettings
from kvmesh.worker.tokenizer_files import TokenizerFiles

SERVICE = "kvmesh.v1.Worker"
VERSION = wire.ProtocolVersion(major=1, minor=0)

_ROUTER_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger(__name__)


class WorkerService:
    """Attach, GetInfo, GetTokenizer, Drain and SetRole.

    Owns the sessions; the engine knows of routers only by a session's key.
    """

    def __init__(
        self,
        engine: Engine,
        record: wire.WorkerRecord,
        tokenizer: TokenizerFiles,
        settings: WorkerSettings,
    ) -> None:
        self.record = record
        self.draining = False
        self.stopping = asyncio.Event()
        """Set when the process is to end: Drain with `stop`, or a signal."""
        self.stop_grace_s = settings.grace_s
        self.role_changed = asyncio.Event()
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._sessions: dict[str, Session] = {}
        self._by_router: dict[str, Session] = {}
        self._session_count = 0
        self._cache = CacheLog(settings.cache_ring_events)
        self._phase = wire.WORKER_PHASE_SERVING
        self._idle = asyncio.Event()
        self._idle.set()

    # -- tasks -------------------------------------------------------------

    async def distribute_outputs(self) -> None:
        """Hands each step's frames to the sessions. Ends with the engine."""
        async for output in self._engine.outputs():
            for key, part in output.routers.items():
                session = self._sessions.get(key)
                if session is not None:
                    session.push_step(output.step, part, output.sample)
            for key, session in self._sessions.items():
                if key in output.routers:
                    continue
                if output.sample is not None and session.attempts:
                    session.push_step(output.step, RouterStep(), output.sample)
                else:
                    session.mark_load()
            self._note_idle()

    async def distribute_events(self) -> None:
        """Appends cache changes to the log that all sessions read."""
        loop = asyncio.get_running_loop()
        due: asyncio.TimerHandle | None = None

        def publish() -> None:
            nonlocal due
            if due is not None:
                due.cancel()
                due = None
            self._cache.publish()
            for session in self._sessions.values():
                session.wake()

        try:
            async for batch in self._engine.events():
                if self._cache.append(batch):
                    publish()
                elif due is None:
                    due = loop.call_later(self._settings.cache_coalesce_ms / 1000, publish)
        finally:
            if due is not None:
                due.cancel()

    async def report_load(self) -> None:
        """Marks the load of every session at the longest interval."""
        interval = self._settings.load_interval_ms / 1000
        while True:
            await asyncio.sleep(interval)
            for session in self._sessions.values():
                session.mark_load()

    # -- Attach ------------------------------------------------------------

    async def attach(self, _requests: AsyncIterator[wire.RouterFrame], context: Any) -> None:
        """One router's session, from its hello to its end."""
        hello = await self._read_hello(context)
        session = await self._open(hello, context)
        reader = asyncio.create_task(self._read_commands(session, context), name="read")
        writer = asyncio.create_task(session.send_all(context.write), name="write")
        closer = asyncio.create_task(session.closed(), name="closed")
        tasks = (reader, writer, closer)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and (error := task.exception()) is not None:
                    _log.warning("session closed router=%s reason=%s", session.router_id, error)
                    code = (
                        grpc.StatusCode.RESOURCE_EXHAUSTED
                        if isinstance(error, SessionClosedError)
                        else grpc.StatusCode.INVALID_ARGUMENT
                        if isinstance(error, ValueError)
                        else grpc.StatusCode.INTERNAL
                    )
                    await context.abort(code, str(error))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._close(session)

    async def _read_hello(self, context: Any) -> wire.RouterHello:
        frame = await context.read()
        if frame is grpc.aio.EOF or not frame.HasField("hello"):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the first frame of a session is hello"
            )
        hello: wire.RouterHello = frame.hello
        if hello.version.major != VERSION.major:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol {hello.version.major}.{hello.version.minor} is not spoken here; "
                f"allowed is {VERSION.major}.x",
            )
        if not _ROUTER_ID.fullmatch(hello.router_id):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                "router_id: allowed are 1 to 128 characters of A-Z a-z 0-9 . _ -",
            )
        return hello

    async def _open(self, hello: wire.RouterHello, context: Any) -> Session:
        known = hello.known_worker_incarnation == self.record.incarnation
        next_event = hello.known_event + 1 if known else 0
        if not self._cache.covers(next_event):
            # An empty cache needs no snapshot; any other does.
            next_event = 1 if self._cache.last_event == 0 else 0
        self._session_count += 1
        session = Session(
            key=f"{hello.router_id}/{self._session_count}",
            router_id=hello.router_id,
            bounds=LaneBounds(
                step_bytes=self._settings.step_lane_bytes,
                step_age_s=self._settings.step_lane_age_s,
                load_coalesce_s=self._settings.load_coalesce_ms / 1000,
            ),
            cache=self._cache,
            next_event=next_event,
            read_load=self.load_for,
            snapshot=self._engine.snapshot,
        )
        previous = self._by_router.get(hello.router_id)
        if previous is not None:
            previous.close(f"router {hello.router_id} attached anew")
        self._by_router[hello.router_id] = session
        self._sessions[session.key] = session
        self.record.step_model.CopyFrom(self._engine.step_model())
        answer = wire.WorkerHello(
            version=VERSION,
            record=self.record,
            last_event=self._cache.last_event,
            resume_event=next_event,
            step_model=self.record.step_model,
        )
        await context.write(wire.WorkerFrame(hello=answer).SerializeToString())
        _log.info(
            "session open router=%s incarnation=%x sessions=%d",
            hello.router_id, hello.router_incarnation, len(self._sessions),
        )  # fmt: skip
        return session

    def _close(self, session: Session) -> None:
        """Cancels what the router has here: it ended these streams already."""
        self._sessions.pop(session.key, None)
        if self._by_router.get(session.router_id) is session:
            del self._by_router[session.router_id]
        orphaned = list(session.attempts)
        session.attempts.clear()
        session.release()
        self._engine.cancel(orphaned)
        self._note_idle()
        _log.info("session closed router=%s cancelled=%d", session.router_id, len(orphaned))

    # -- commands ----------------------------------------------------------

    async def _read_commands(self, session: Session, context: Any) -> None:
        while True:
            frame = await context.read()
            if frame is grpc.aio.EOF:
                return
            self._command(session, frame)
            if frame.number:
                session.last_command = frame.number
                session.mark_load()

    def _command(self, session: Session, frame: wire.RouterFrame) -> None:
        match frame.WhichOneof("frame"):
            case "place":
                self._place(session, frame.place)
            case "cancel":
                self._cancel(session, frame.cancel)
            case "hand_over":
                command = frame.hand_over
                self._engine.hand_over(_attempt_id(command), command.next_attempt, command.hand_off)
            case "find" | "claim" as kind:
                # Nothing outlives its session here, so nothing is ever found.
                generation = getattr(frame, kind).generation
                found = wire.Found(generation=generation, known=False)
                session.push_found(found)
            case "hello":
                raise ValueError("hello comes once, as the first frame")
            case _:
                _log.debug("unknown frame ignored router=%s", session.router_id)

    def _place(self, session: Session, place: wire.Place) -> None:
        attempt = _attempt_id(place)
        refusal = self._refusal(place)
        if refusal is not None:
            opening = wire.Opening(
                generation=place.generation,
                owner=place.owner,
                attempt=place.attempt,
                stage=place.stage,
                refused=refusal,
            )
            session.push_step(0, RouterStep(openings=[opening]), None)
            return
        session.attempts.add(attempt)
        self._idle.clear()
        self._engine.submit(
            Placement(
                id=attempt,
                router=session.key,
                stage=Stage(place.stage),
                continuation=place.continuation,
                received_at=time.monotonic(),
                hand_off=place.hand_off if place.HasField("hand_off") else None,
                prefix_from=place.prefix_from if place.HasField("prefix_from") else None,
                request_id=place.request_id,
                traceparent=place.traceparent,
                alone=place.alone,
                trace=place.trace,
            )
        )

    def _refusal(self, place: wire.Place) -> wire.Refused | None:
        if self.draining:
            return wire.Refused(
                reason=wire.REFUSAL_REASON_DRAINING, message="the worker takes no new work"
            )
        model = place.continuation.model
        problem = ""
        if place.stage == wire.STAGE_UNSPECIFIED:
            problem = "stage is not set"
        elif not place.continuation.prompt_ids:
            problem = "the prompt is empty"
        elif model != self.record.model.name:
            problem = f"model {model} is not served here"
        elif (
            place.continuation.adapter
            and place.continuation.adapter not in self.record.model.adapters
        ):
            problem = f"adapter {place.continuation.adapter} is not served here"
        if problem:
            return wire.Refused(reason=wire.REFUSAL_REASON_UNSUPPORTED, message=problem)
        return None

    def _cancel(self, session: Session, cancel: wire.Cancel) -> None:
        """Ends the named attempt and those of the generation before it."""
        named = _attempt_id(cancel)
        self._engine.cancel(
            [
                held
                for held in session.attempts
                if held.generation == named.generation
                and (held.owner, held.attempt) <= (named.owner, named.attempt)
            ]
        )

    # -- load and state ----------------------------------------------------

    def load_for(self, session: Session | None) -> wire.Load:
        """Load as one router sees it; for None, all routers' work is `own`."""
        state = self._engine.load()
        own, others = wire.LoadShare(), wire.LoadShare()
        for key, share in state.shares.items():
            _add(own if session is None or key == session.key else others, share)
        silent_after = max(1000.0, 4 * state.step_predicted_ms)
        return wire.Load(
            last_command=session.last_command if session else 0,
            role=self.record.role,
            phase=self._phase,
            draining=self.draining,
            kv=state.kv,
            own=own,
            others=others,
            step=state.step,
            step_age_ms=state.step_age_ms,
            step_predicted_ms=state.step_predicted_ms,
            engine_silent=state.step_age_ms > silent_after,
        )

    def _mark_all(self) -> None:
        for session in self._sessions.values():
            session.mark_load()

    def running(self) -> int:
        """Attempts that have not ended."""
        return sum(len(session.attempts) for session in self._sessions.values())

    def _note_idle(self) -> None:
        if self.running() == 0:
            self._idle.set()

    async def stop(self, grace_s: float) -> None:
        """Takes no new work, gives running work time, then gives it back."""
        self.draining = True
        self._phase = wire.WORKER_PHASE_STOPPING
        self._mark_all()
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("grace ended running=%d", self.running())
            for session in list(self._sessions.values()):
                self._give_back(session)

    def _give_back(self, session: Session) -> None:
        attempts = list(session.attempts)
        returned = wire.Returned(
            reason=wire.REFUSAL_REASON_DRAINING, message="the worker's grace time ended"
        )
        ends = [
            wire.StageEnd(
                generation=a.generation, owner=a.owner, attempt=a.attempt, returned=returned
            )
            for a in attempts
        ]
        session.push_step(0, RouterStep(ends=ends), None)
        self._engine.cancel(attempts)

    # -- unary -------------------------------------------------------------

    async def get_info(self, _request: wire.GetInfoRequest, _context: Any) -> bytes:
        """The record, the load and what is held."""
        return wire.GetInfoResponse(
            record=self.record,
            load=self.load_for(None),
            routers=sorted(self._by_router),
            residue=self._engine.residue(),
        ).SerializeToString()

    async def get_tokenizer(self, request: wire.GetTokenizerRequest, context: Any) -> None:
        """Streams the tokeniser's files."""
        for message in self._tokenizer.messages(request.known_digest):
            await context.write(message.SerializeToString())

    async def drain(self, request: wire.DrainRequest, _context: Any) -> bytes:
        """Takes no new work; ends the process when idle, if asked to."""
        self.draining = True
        self._mark_all()
        _log.info("drain running=%d stop=%s", self.running(), request.stop)
        if request.stop:
            self.stop_grace_s = request.grace_ms / 1000 or self._settings.grace_s
            self.stopping.set()
        return wire.DrainResponse(running=self.running()).SerializeToString()

    async def set_role(self, request: wire.SetRoleRequest, context: Any) -> bytes:
        """Changes the role; running work goes on."""
        if request.role == wire.ROLE_UNSPECIFIED:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                "role is not set; allowed are ROLE_PREFILL, ROLE_DECODE and ROLE_BOTH",
            )
        self.record.role = request.role
        self.role_changed.set()
        self._mark_all()
        _log.info("role changed role=%s", wire.Role.Name(request.role))
        return wire.SetRoleResponse(role=request.role).SerializeToString()

    # -- gRPC --------------------------------------------------------------

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers of the service. Responses are bytes: a frame may be encoded
        once and sent to many."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Attach": grpc.stream_stream_rpc_method_handler(
                    self.attach, wire.RouterFrame.FromString
                ),
                "GetInfo": grpc.unary_unary_rpc_method_handler(
                    self.get_info, wire.GetInfoRequest.FromString
                ),
                "GetTokenizer": grpc.unary_stream_rpc_method_handler(
                    self.get_tokenizer, wire.GetTokenizerRequest.FromString
                ),
                "Drain": grpc.unary_unary_rpc_method_handler(
                    self.drain, wire.DrainRequest.FromString
                ),
                "SetRole": grpc.unary_unary_rpc_method_handler(
                    self.set_role, wire.SetRoleRequest.FromString
                ),
            },
        )


def _attempt_id(command: wire.Place | wire.Cancel | wire.HandOver) -> AttemptId:
    if len(command.generation) != 16 or command.owner == 0 or command.attempt == 0:
        raise ValueError(
            "a command names no attempt: generation is 16 bytes, owner and attempt count from 1"
        )
    return AttemptId(command.generation, command.owner, command.attempt)


def _add(total: wire.LoadShare, share: wire.LoadShare) -> None:
    total.queued += share.queued
    total.queued_prefill_tokens += share.queued_prefill_tokens
    total.running_prefill_tokens += share.running_prefill_tokens
    total.decoding += share.decoding
    total.decode_context += share.decode_context
    total.receiving += share.receiving
    for to, of_class in (
        (total.interactive, share.interactive),
        (total.standard, share.standard),
        (total.batch, share.batch),
    ):
        to.waiting += of_class.waiting
        to.waiting_tokens += of_class.waiting_tokens
        to.decoding += of_class.decoding
