"""The engine thread: commands, transfers, steps. It owns everything.

One turn: take what came in, choose a step, run it, say what it brought. With
nothing to do the thread waits on one thing, which a command or a transfer
ends.

A step with prompts and no decoding streams can be held between two layers
while something more urgent runs to its end: a more urgent prompt, or streams
whose next token is due. Steps so nest; each counts only its own time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from kvmesh.engine.contract import AttemptId, CacheBatch, Placement, Stage, StepOutput
from kvmesh.engine.core.admission import Admission
from kvmesh.engine.core.answers import Answers
from kvmesh.engine.core.blocks import BlockPool, Hold
from kvmesh.engine.core.hand_off import HandOffs
from kvmesh.engine.core.outbox import Outbox
from kvmesh.engine.core.queue import Plan, Priority, PromptQueue
from kvmesh.engine.core.runner import ColumnRunner, Runner, Sampled, Slice
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.engine.core.shares import Shares
from kvmesh.engine.core.step_model import StepLoad, predict_ms
from kvmesh.engine.core.streams import Streams
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh._router import TransferNode

_log = logging.getLogger(__name__)

_URGENT: Priority = (float("-inf"), 0)
_INTERNAL = 13  # google.rpc.Code


class Clock(Protocol):
    """Where the loop takes the time from; seconds, never going back."""

    def now(self) -> float:
        """Now."""


@dataclass(slots=True)
class Running:
    """The step that runs, as other threads may read it."""

    number: int = 0
    """Steps that have ended."""
    since: float = 0.0
    """When the running one began; 0: none runs."""
    predicted_ms: float = 0.0


class EngineLoop:
    """What the engine thread does."""

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        settings: CoreSettings,
        model: wire.StepModel,
        node: TransferNode | None,
        clock: Clock,
        max_logprobs: int,
    ) -> None:
        self.pool = pool
        self.running = Running()
        self.shares = Shares()
        self.outputs: Outbox[StepOutput] = Outbox(settings.outbox_steps)
        self.events: Outbox[CacheBatch] = Outbox(1 << 30)
        self.sequences: dict[AttemptId, Sequence] = {}
        self.hand_offs = HandOffs(node, pool) if node is not None else None
        self._runner = runner
        self._columns = cast(ColumnRunner, runner) if hasattr(runner, "forward_columns") else None
        self._settings = settings
        self._model = model
        self._node = node
        self._clock = clock
        self._inbox: deque[Callable[[EngineLoop], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._answers = Answers()
        self.queue = PromptQueue(pool, settings, self._begin, self._may_lose_room)
        self.admission = Admission(self, settings, max_logprobs)
        self.streams = Streams(self, pool, settings)
        self._suspect_turn = False

    @property
    def transfer_address(self) -> str:
        """Where peers reach the transfer node; empty: there is none."""
        return self._node.address if self._node is not None else ""

    @property
    def answers(self) -> Answers:
        """What is said at the next flush."""
        return self._answers

    # -- from any thread ---------------------------------------------------

    def post(self, command: Callable[[EngineLoop], None]) -> None:
        """Has something done by the engine thread."""
        self._inbox.append(command)
        self.wake()

    def wake(self) -> None:
        """Ends the thread's wait."""
        if self._node is not None:
            self._node.wake()
        else:
            self._wake.set()

    def stop(self) -> None:
        """Ends the thread after the running layer."""
        self._closing = True
        self.wake()

    # -- the thread --------------------------------------------------------

    def run(self) -> None:
        """Works until `stop`."""
        try:
            while not self._closing:
                self._take_in()
                self._flush(0, None)
                if not self.outputs.wait_for_room(0.1):
                    continue
                plan = self._plan(None)
                if plan is None:
                    self._wait()
                else:
                    self._run(plan)
        except Exception:
            # The worker ends with the outputs: an engine half alive helps nobody.
            _log.critical("engine thread failed", exc_info=True)
        finally:
            self._end_all()
            self.outputs.close()
            self.events.close()

    def _wait(self) -> None:
        if self._inbox or self._closing:
            return
        if self._node is not None:
            self._node.wait(None)
        else:
            self._wake.wait()
            self._wake.clear()

    def _take_in(self) -> None:
        """Commands and transfer events that have come."""
        changed = bool(self._inbox)
        while self._inbox:
            self._inbox.popleft()(self)
        if self._node is not None:
            for event in self._node.poll():
                self.admission.transfer_event(event)
                changed = True
        if self.streams.stalled:
            self.streams.retry_stalled()
        if changed:
            self.shares.count(self.sequences.values())

    def _flush(self, step: int, sample: wire.StepSample | None) -> None:
        output = self._answers.take(step, sample)
        if output is not None:
            self.outputs.put(output)
        batch = self.pool.journal.drain()
        if batch is not None:
            self.events.put(batch)

    # -- a step ------------------------------------------------------------

    def _plan(self, above: Priority | None) -> Plan | None:
        """What to compute next. `above`: beside a step that is held between layers."""
        batch, free = self.streams.batch, not self.queue.in_step
        if self.streams.suspects and free:
            others = bool(batch.sequences or self.queue.waiting)
            self._suspect_turn = not self._suspect_turn or not others
            if self._suspect_turn:
                return Plan(alone=self.streams.suspects[0])
        batch.prepare()
        decode = StepLoad(decode_batch=len(batch), decode_context=batch.context)
        chunks = self.queue.chunks(self._model, decode, batch.itl_target_ms, above)
        if chunks and chunks[0].sequence.alone:
            if above is None:
                return Plan(chunks=chunks[:1])
            chunks = []
        if not chunks and not len(batch):
            return None
        return Plan(chunks=chunks, decode=bool(len(batch)))

    def _run(self, plan: Plan) -> None:
        load = self._load_of(plan)
        begun = self._clock.now()
        outer = (self.running.since, self.running.predicted_ms)
        self.running.predicted_ms = predict_ms(self._model, load)
        self.running.since = begun
        keys = {chunk.sequence.key for chunk in plan.chunks}
        self.queue.in_step |= keys
        for chunk in plan.chunks:
            if not chunk.sequence.times.first_step:
                chunk.sequence.times.first_step = begun
        nested = [0.0]
        result = None
        try:
            result = self._forward(plan, nested)
        except Exception as error:
            _log.exception(
                "step failed prompts=%d decode=%d", len(plan.chunks), len(self.streams.batch)
            )
            self._fail(plan, error)
        self.queue.in_step -= keys
        self.running.since, self.running.predicted_ms = outer
        self._drop_ended(plan)
        if result is None:
            self.shares.count(self.sequences.values())
            self._flush(0, None)
            return
        ended = self._clock.now()
        if plan.decode:
            self.streams.decoded_at = ended
        self._take_result(plan, *result, ended)
        self.running.number += 1
        duration = max(0.0, ended - begun - nested[0])
        sample = wire.StepSample(
            prefill_tokens=load.prefill_tokens,
            prefill_context=load.prefill_context,
            decode_batch=load.decode_batch,
            decode_context=load.decode_context,
            duration_us=int(duration * 1e6),
        )
        self._flush(self.running.number, sample)

    def _load_of(self, plan: Plan) -> StepLoad:
        load = StepLoad()
        for chunk in plan.chunks:
            load.add_chunk(chunk.sequence.computed, chunk.tokens)
        if plan.decode:
            load.decode_batch, load.decode_context = (
                len(self.streams.batch),
                self.streams.batch.context,
            )
        elif plan.alone is not None:
            load.decode_batch, load.decode_context = 1, plan.alone.length
        return load

    def _forward(
        self, plan: Plan, nested: list[float]
    ) -> tuple[list[Sampled | None], list[int], list[Sampled | None]] | None:
        """Runs the model. Returns draws of chunks, tokens of rows, draws of rows as slices.

        None: abandoned, nobody wants it any more.
        """
        slices = [self._slice(chunk.sequence, chunk.tokens) for chunk in plan.chunks]
        if plan.alone is not None:
            slices.append(self._slice(plan.alone, 1))
        by_columns = plan.decode and self._columns is not None and self.streams.batch.plain
        forward: Generator[None, None, Any]
        if by_columns and self._columns is not None:
            forward = self._columns.forward_columns(slices, self.streams.batch.rows)
        else:
            rows = self.streams.batch.slices() if plan.decode else []
            forward = self._runner.forward(slices + rows)
        hold = bool(plan.chunks) and not plan.decode
        try:
            while True:
                next(forward)
                if hold and not self._between_layers(plan, nested):
                    forward.close()
                    return None
        except StopIteration as done:
            result = done.value
        if by_columns:
            sampled, tokens = result
            return sampled, tokens, []
        first = len(slices)
        draws: list[Sampled | None] = result[first:]
        return result[:first], [draw.token_id for draw in draws if draw is not None], draws

    def _slice(self, sequence: Sequence, tokens: int) -> Slice:
        start = sequence.computed
        end = start + tokens
        last = end == sequence.length
        prompt_only = sequence.stage is Stage.PREFILL and not self._emits_first_token
        return Slice(
            ids=np.array(sequence.ids(start, end), dtype=np.uint32),
            start=start,
            blocks=sequence.block_table(end, self.pool.block_tokens),
            sample=sequence.sample_spec() if last and not prompt_only else None,
            tag=sequence.tag,
            key=sequence.key,
        )

    @property
    def _emits_first_token(self) -> bool:
        return self._settings.behaviour.prefill_emits_first_token

    def _between_layers(self, plan: Plan, nested: list[float]) -> bool:
        """Lets what is more urgent run. False: the step is wanted by nobody now."""
        self._take_in()
        if self._closing or all(c.sequence.state is State.ENDED for c in plan.chunks):
            return False
        self._flush(0, None)
        if not self._settings.behaviour.layer_preemption:
            return True
        begun = self._clock.now()
        while self._is_due(plan):
            above = plan.priority if not plan.chunks[0].sequence.alone else _URGENT
            inner = self._plan(above)
            if inner is None:
                break
            self._run(inner)
            if not inner.chunks:
                # The streams had their turn; the urgent prompt has no room yet.
                break
        if (spent := self._clock.now() - begun) > 0:
            nested[0] += spent
        return True

    def _is_due(self, plan: Plan) -> bool:
        head = next(
            (s for s in self.queue.waiting if s.key not in self.queue.in_step
             and s.state is not State.FETCHING), None
        )  # fmt: skip
        more_urgent = head is not None and head.priority < plan.priority and not head.alone
        return more_urgent or self._decode_is_due(plan)

    def _decode_is_due(self, plan: Plan) -> bool:
        """Whether streams would miss their target if another layer ran first."""
        if not len(self.streams.batch) or plan.chunks[0].sequence.alone:
            return False
        layer_s = self.running.predicted_ms / 1000 / max(1, self._runner.layers)
        target_ms = self.streams.batch.itl_target_ms or self._settings.default_itl_target_ms
        return self._clock.now() + layer_s - self.streams.decoded_at >= target_ms / 1000

    # -- what a step brought -----------------------------------------------

    def _take_result(
        self,
        plan: Plan,
        sampled: list[Sampled | None],
        tokens: list[int],
        draws: list[Sampled | None],
        now: float,
    ) -> None:
        if plan.decode:
            self.streams.take_tokens(tokens, draws)
        for chunk, draw in zip(plan.chunks, sampled, strict=False):
            if chunk.sequence.state is not State.ENDED:
                self._take_chunk(chunk.sequence, chunk.tokens, draw, now)
        if plan.alone is not None and sampled[-1] is not None:
            self.streams.take_suspect(plan.alone, sampled[-1])
        if plan.chunks or plan.alone is not None:
            self.shares.count(self.sequences.values())

    def _take_chunk(
        self, sequence: Sequence, tokens: int, draw: Sampled | None, now: float
    ) -> None:
        sequence.computed += tokens
        sequence.times.computed_tokens += tokens
        self.store(sequence)
        if sequence.hands_off and not self.admission.announce(sequence):
            return
        if sequence.computed < sequence.length:
            return
        sequence.times.prefill_end = now
        self.queue.remove(sequence)
        if draw is None:
            self.admission.finish_prefill(sequence)
            return
        reason = self.take_draw(sequence, draw)
        if reason is not None:
            self.finish(sequence, reason)
        elif sequence.hands_off:
            self.admission.commit(sequence, draw)
        else:
            self.streams.decode(sequence)

    def take_draw(self, sequence: Sequence, draw: Sampled) -> inference.FinishReason | None:
        """One token of one stream, outside of the columns."""
        index = len(sequence.output_ids)
        sequence.output_ids.append(draw.token_id)
        logprobs = [] if draw.logprobs is None else [draw.logprobs]
        self._answers.tokens(sequence, index, [draw.token_id], logprobs)
        return sequence.finish_reason(draw.token_id)

    def store(self, sequence: Sequence) -> None:
        """Makes blocks that became full shareable."""
        size = self.pool.block_tokens
        full = sequence.computed // size
        if full > sequence.stored:
            ids = sequence.ids(sequence.stored * size, full * size)
            self.pool.store(sequence.root, sequence.blocks, sequence.stored, ids)
            sequence.stored = full

    def _may_lose_room(self, sequence: Sequence) -> bool:
        return self.hand_offs is None or not self.hand_offs.has_announced(sequence)

    def _begin(self, sequence: Sequence) -> None:
        self.admission.begin(sequence)

    # -- ends --------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: inference.FinishReason) -> None:
        """Ends an attempt whose output is complete."""
        finished = wire.StageFinished(reason=reason)
        if reason == inference.FINISH_REASON_STOP:
            finished.stop_token_id = sequence.output_ids[-1]
        self.end(sequence, "finished", finished=finished)

    def end(self, sequence: Sequence, why: Any = "cancelled", **end: Any) -> None:
        """Ends an attempt, says so, and frees what no copy or step still uses."""
        if sequence.state is State.ENDED:
            return
        self._answers.end(sequence, **end)
        del self.sequences[sequence.id]
        was = sequence.state
        sequence.state = State.ENDED
        self.queue.remove(sequence)
        if was is State.DECODING:
            if sequence in self.streams.batch.sequences:
                self.streams.batch.leave((sequence,))
            for group in (self.streams.suspects, self.streams.stalled):
                if sequence in group:
                    group.remove(sequence)
        busy = self.hand_offs is not None and self.hand_offs.abort(sequence, why)
        if not busy and sequence.key not in self.queue.in_step:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Gives a sequence's blocks back."""
        self.pool.drop(sequence.blocks, Hold.RUNNING)
        sequence.blocks = []
        self.pool.close_root(sequence.root)

    def _drop_ended(self, plan: Plan) -> None:
        """Frees what ended while its step ran."""
        for chunk in plan.chunks:
            if chunk.sequence.state is State.ENDED:
                self.release(chunk.sequence)

    def _fail(self, plan: Plan, error: Exception) -> None:
        """Ends everyone whose step raised."""
        failed = wire.StageFailed(
            code=_INTERNAL,
            reason="ENGINE_STEP_FAILED",
            message=type(error).__name__,
            retryable=True,
        )
        members = [chunk.sequence for chunk in plan.chunks]
        members += list(self.streams.batch.sequences) if plan.decode else []
        members += [plan.alone] if plan.alone is not None else []
        for sequence in members:
            self.end(sequence, "failed", failed=failed)

    def cancel(self, attempts: list[AttemptId]) -> None:
        """Ends attempts by command."""
        for attempt in attempts:
            sequence = self.sequences.get(attempt)
            if sequence is not None:
                self.end(sequence, cancelled=wire.Cancelled())

    def submit(self, placement: Placement) -> None:
        """Takes a placement in; one that nobody thought of harms no other."""
        try:
            self.admission.submit(placement)
        except Exception:
            _log.exception("placement refused request_id=%s", placement.request_id)
            self.admission.refuse_unread(placement)

    def _end_all(self) -> None:
        if self._node is not None:
            self._node.close()
        self.sequences.clear()
