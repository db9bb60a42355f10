"""One step of the engine: what it computes, the computing, what it brought.

A step with prompts and no decoding streams can be held between two layers
while something more urgent runs to its end: a more urgent prompt, or streams
whose next token is due. Steps so nest; each counts only its own time. One with
streams is held by nobody: its prompts fit the preemption target (queue.py).
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from kvmesh._router import DecodeLoop, WorkerPort
from kvmesh.engine.contract import Stage, StepOutput, StepSample
from kvmesh.engine.core.decode_rows import DecodeBatch
from kvmesh.engine.core.queue import Plan, Priority
from kvmesh.engine.core.runner import ColumnRunner, Runner, Sampled, Slice
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.engine.core.step_model import Pace, StepLoad, gap_target_ms, predict_ms
from kvmesh.engine.core.trace import StepLog
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh.engine.core.loop import EngineLoop

_log = logging.getLogger(__name__)

_URGENT: Priority = (float("-inf"), 0)
_INTERNAL = 13  # google.rpc.Code


class Clock(Protocol):
    """Where the engine takes the time from; seconds, never going back."""

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


class _Said:
    """What steps of one composition of streams say alike."""

    __slots__ = ("base_ms", "composition", "context_ms", "output", "paced", "settled", "size")

    def __init__(self, batch: DecodeBatch, model: wire.StepModel) -> None:
        self.composition = batch.rows.composition
        self.size = len(batch)
        self.base_ms = model.a_ms + model.d_ms * self.size
        self.context_ms = model.e_ms
        self.output = StepOutput(routers=batch.answers)
        self.paced: DecodeLoop | None = None
        """Runs these steps without Python, where they only take time."""
        self.settled = -1
        """State of the pool that `output` tells (`BlockPool.settled`)."""


class Steps:
    """Chooses and runs steps. Used by the engine thread alone, but for `running`."""

    def __init__(
        self,
        loop: EngineLoop,
        runner: Runner,
        settings: CoreSettings,
        model: wire.StepModel,
        clock: Clock,
    ) -> None:
        self.running = Running()
        self._loop = loop
        self._runner = runner
        self._columns = cast(ColumnRunner, runner) if hasattr(runner, "forward_columns") else None
        self._settings = settings
        self._model = model
        self._pace = Pace()
        self._clock = clock
        self.log = StepLog()
        self._suspect_turn = False
        self._said = _Said(loop.streams.batch, model)

    # -- a step ------------------------------------------------------------

    def plan(self, above: Priority | None) -> Plan | None:
        """What to compute next. `above`: beside a step that is held between layers."""
        batch, free = self._loop.streams.batch, not self._loop.queue.in_step
        if self._loop.streams.suspects and free:
            others = bool(batch.sequences or self._loop.queue.waiting)
            self._suspect_turn = not self._suspect_turn or not others
            if self._suspect_turn:
                return Plan(alone=self._loop.streams.suspects[0])
        batch.prepare()
        decode = batch.load()
        chunks = self._loop.queue.chunks(self._model, decode, batch.itl_target_ms, above)
        if chunks and chunks[0].sequence.alone:
            if above is None:
                return Plan(chunks=chunks[:1])
            chunks = []
        if not chunks and not len(batch):
            return None
        return Plan(chunks=chunks, decode=bool(len(batch)))

    def run(self, plan: Plan) -> None:
        """Runs a step to its end and says what it brought."""
        load = self._load_of(plan)
        begun = self._clock.now()
        outer = (self.running.since, self.running.predicted_ms)
        modelled_ms = predict_ms(self._model, load)
        self.running.predicted_ms = self._pace.told_ms(modelled_ms)
        self.running.since = begun
        self._loop.sink.begin_step(self.running.predicted_ms)
        if plan.decode or plan.alone is not None:
            self._loop.streams.step_begins(begun, plan.alone)
        keys = {chunk.sequence.key for chunk in plan.chunks}
        self._loop.queue.in_step |= keys
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if not sequence.times.first_step:
                sequence.times.first_step = begun
            if sequence.trace is not None:
                sequence.trace.chunk_begins(begun)
        nested = [0.0]
        result = None
        try:
            result = self._forward(plan, nested)
        except Exception as error:
            _log.exception(
                "step failed prompts=%d decode=%d", len(plan.chunks), len(self._loop.streams.batch)
            )
            self._fail(plan, error)
        ended = self._clock.now()
        since, predicted_ms = outer
        # A step that was held for this one is no older for it: routers take one
        # that is much older than predicted for stuck.
        self.running.since = since + (ended - begun) if since else 0.0
        self.running.predicted_ms = predicted_ms
        self._drop_ended(plan)
        if result is None:
            self._loop.queue.in_step -= keys
            self._loop.count_shares()
            self._loop.flush(0, None)
            return
        if plan.decode:
            self._loop.streams.decoded_at = ended
            self.log.add(begun, ended, load.prefill_tokens)
        for chunk in plan.chunks:
            if chunk.sequence.trace is not None:
                chunk.sequence.trace.add("prefill_chunk", begun, ended, chunk.tokens)
        self._take_result(plan, *result, ended)
        self.running.number += 1
        duration = max(0.0, ended - begun - nested[0])
        self._pace.took(modelled_ms, duration * 1e3)
        sample = StepSample(
            load.prefill_tokens,
            load.prefill_context,
            load.decode_batch,
            load.decode_context,
            int(duration * 1e6),
        )
        self._loop.flush(self.running.number, sample)

    def run_streams(self) -> bool:
        """A step of decoding streams alone, by columns. False: there is more to weigh.

        This is what most steps are, so nothing here is done a stream, and what
        the step before said is said again with what has changed.
        """
        loop, columns = self._loop, self._columns
        batch = loop.streams.batch
        if columns is None or loop.queue.waiting or loop.streams.suspects or not batch.steady:
            return False
        if self._said.composition != batch.rows.composition:
            self._said = self._begin_saying(batch, columns)
        if self._said.paced is not None:
            self._run_paced(self._said, self._said.paced)
            return True
        said, running, now = self._said, self.running, self._clock.now
        context = batch.rows.context
        modelled_ms = said.base_ms + said.context_ms * context
        running.predicted_ms = predicted_ms = self._pace.told_ms(modelled_ms)
        running.since = begun = now()
        loop.sink.begin_step(predicted_ms)
        try:
            tokens = columns.decode_columns(batch.rows)
        except Exception as error:
            _log.exception("step failed prompts=0 decode=%d", said.size)
            running.since = running.predicted_ms = 0.0
            self._fail(Plan(decode=True), error)
            loop.count_shares()
            loop.flush(0, None)
            return True
        loop.streams.decoded_at = ended = now()
        self._pace.took(modelled_ms, (ended - begun) * 1e3)
        self.log.add(begun, ended)
        running.since = running.predicted_ms = 0.0
        running.number += 1
        sample = StepSample(0, 0, said.size, context, int((ended - begun) * 1e6))
        due = batch.advance(tokens)
        if due:
            loop.streams.take_due(tokens, (), due)
            loop.flush(running.number, sample)
            return True
        batch.tell(tokens)
        loop.shares.stepped()
        loop.sink.step(self._output(said, sample))
        return True

    def _begin_saying(self, batch: DecodeBatch, columns: ColumnRunner) -> _Said:
        said, sink, node = _Said(batch, self._model), self._loop.sink, self._loop.node
        paced = columns.paced(batch.rows)
        if paced is not None and node is not None and isinstance(sink, WorkerPort):
            said.paced = DecodeLoop(
                sink,
                node,
                paced.streams,
                rows=batch.router_rows,
                stop_ids=sorted(batch.stop_ids),
                predicted_ms=(said.base_ms, said.context_ms),
                takes_s=paced.takes_s,
            )
        return said

    def _run_paced(self, said: _Said, paced: DecodeLoop) -> None:
        """As `run_streams`, many steps at once, up to one that needs a look."""
        loop, running, batch = self._loop, self.running, self._loop.streams.batch
        most, look = batch.steps_ahead()
        batch.next_indices()
        rows, called = batch.rows, self._clock.now()
        try:
            steps, told, times = paced.run(
                self._output(said, None), rows.ids, rows.tables, rows.context, most, look
            )
        except Exception as error:
            _log.exception("steps failed prompts=0 decode=%d", said.size)
            self._fail(Plan(decode=True), error)
            loop.count_shares()
            loop.flush(0, None)
            return
        loop.streams.decoded_at = self._clock.now()
        for begun, ended in times:
            self.log.add(called + begun, called + ended)
        running.number += len(steps)
        if known := steps if told else steps[:-1]:
            batch.take(known)
            loop.shares.stepped(len(known))
        if not told:
            sample = StepSample(0, 0, said.size, rows.context, int((ended - begun) * 1e6))
            loop.streams.take_tokens(steps[-1], ())
            loop.flush(running.number, sample)

    def _output(self, said: _Said, sample: StepSample | None) -> StepOutput:
        """What is said of a step, but for its tokens."""
        loop, output = self._loop, said.output
        output.step, output.sample = self.running.number, sample
        load = output.load
        load.shares, load.step = loop.shares.read(), self.running.number
        if said.settled != loop.pool.settled:
            said.settled, load.kv = loop.pool.settled, loop.pool.room()
        return output

    def _load_of(self, plan: Plan) -> StepLoad:
        load = self._loop.streams.batch.load() if plan.decode else StepLoad()
        for chunk in plan.chunks:
            load.add_chunk(chunk.sequence.computed, chunk.tokens)
        if not plan.decode and plan.alone is not None:
            load.decode_batch, load.decode_context = 1, plan.alone.length
        return load

    def _forward(
        self, plan: Plan, nested: list[float]
    ) -> tuple[list[Sampled | None], bytes, list[Sampled | None]] | None:
        """Runs the model. Returns draws of chunks, tokens of rows, draws of rows as slices.

        None: abandoned, nobody wants it any more.
        """
        slices = [self._slice(chunk.sequence, chunk.tokens) for chunk in plan.chunks]
        if plan.alone is not None:
            slices.append(self._slice(plan.alone, 1))
        by_columns = plan.decode and self._columns is not None and self._loop.streams.batch.plain
        forward: Generator[None, None, Any]
        if by_columns and self._columns is not None:
            forward = self._columns.forward_columns(slices, self._loop.streams.batch.rows)
        else:
            rows = self._loop.streams.batch.slices() if plan.decode else []
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
        tokens = array("I", [draw.token_id for draw in draws if draw is not None]).tobytes()
        return result[:first], tokens, draws

    def _slice(self, sequence: Sequence, tokens: int) -> Slice:
        start = sequence.computed
        end = start + tokens
        last = end == sequence.length
        prompt_only = sequence.stage is Stage.PREFILL and not self._emits_first_token
        return Slice(
            ids=np.array(sequence.ids(start, end), dtype=np.uint32),
            start=start,
            blocks=sequence.block_table(end, self._loop.pool.block_tokens),
            sample=sequence.sample_spec() if last and not prompt_only else None,
            tag=sequence.tag,
            key=sequence.key,
        )

    @property
    def _emits_first_token(self) -> bool:
        return self._settings.behaviour.prefill_emits_first_token

    def _between_layers(self, plan: Plan, nested: list[float]) -> bool:
        """Lets what is more urgent run. False: the step is wanted by nobody now."""
        self._loop.take_in()
        if self._loop.closing or all(c.sequence.state is State.ENDED for c in plan.chunks):
            return False
        self._loop.flush(0, None)
        if not self._settings.behaviour.layer_preemption:
            return True
        begun, ran = self._clock.now(), False
        while (due := self._decode_is_due(plan)) or self._is_passed(plan):
            above = plan.priority if not plan.chunks[0].sequence.alone else _URGENT
            inner = self.plan(above)
            if inner is None or not (inner.chunks or due):
                # The urgent prompt has no room yet, and no stream's token is due.
                break
            self.run(inner)
            ran = True
            if not inner.chunks:
                # The streams had their turn.
                break
        # A look that found nothing is part of the step.
        if ran:
            spent = self._clock.now() - begun
            nested[0] += spent
            for chunk in plan.chunks:
                if chunk.sequence.trace is not None:
                    chunk.sequence.trace.add(
                        "pause", begun, begun + spent, cause="more urgent work between two layers"
                    )
        return True

    def _is_passed(self, plan: Plan) -> bool:
        """Whether a prompt waits that is more urgent."""
        head = next(
            (s for s in self._loop.queue.waiting if s.key not in self._loop.queue.in_step
             and s.state is not State.FETCHING), None
        )  # fmt: skip
        return head is not None and head.priority < plan.priority and not head.alone

    def _decode_is_due(self, plan: Plan) -> bool:
        """Whether streams would miss their target if another layer ran first."""
        if not len(self._loop.streams.batch) or plan.chunks[0].sequence.alone:
            return False
        batch = self._loop.streams.batch
        step_ms = predict_ms(self._model, batch.load())
        layer_ms = self.running.predicted_ms / max(1, self._runner.layers)
        since_ms = 1000 * (self._clock.now() - self._loop.streams.decoded_at)
        return since_ms + layer_ms + step_ms >= gap_target_ms(batch.itl_target_ms, step_ms)

    # -- what a step brought -----------------------------------------------

    def _take_result(
        self,
        plan: Plan,
        sampled: list[Sampled | None],
        tokens: bytes,
        draws: list[Sampled | None],
        now: float,
    ) -> None:
        if plan.decode:
            self._loop.streams.take_tokens(tokens, draws)
        # Only now: a stream that needs a block may not take it from a prompt
        # whose chunk has not been counted yet.
        self._loop.queue.in_step -= {chunk.sequence.key for chunk in plan.chunks}
        for chunk, draw in zip(plan.chunks, sampled, strict=False):
            if chunk.sequence.state is not State.ENDED:
                self._take_chunk(chunk.sequence, chunk.tokens, draw, now)
        if plan.alone is not None and sampled[-1] is not None:
            self._loop.streams.take_suspect(plan.alone, sampled[-1])
        if plan.chunks or plan.alone is not None:
            self._loop.count_shares()

    def _take_chunk(
        self, sequence: Sequence, tokens: int, draw: Sampled | None, now: float
    ) -> None:
        sequence.computed += tokens
        sequence.times.computed_tokens += tokens
        self._loop.store(sequence)
        if sequence.hands_off and not self._loop.admission.announce(sequence):
            return
        if sequence.computed < sequence.length:
            return
        sequence.times.prefill_end = now
        self._loop.queue.remove(sequence)
        if draw is None:
            self._loop.admission.finish_prefill(sequence)
            return
        reason = self._loop.take_draw(sequence, draw)
        if reason is not None:
            self._loop.finish(sequence, reason)
        elif sequence.hands_off:
            self._loop.admission.commit(sequence, draw)
        else:
            self._loop.streams.decode(sequence)

    def _drop_ended(self, plan: Plan) -> None:
        """Frees what ended while its step ran."""
        for chunk in plan.chunks:
            if chunk.sequence.state is State.ENDED:
                self._loop.release(chunk.sequence)

    def _fail(self, plan: Plan, error: Exception) -> None:
        """Ends everyone whose step raised."""
        failed = wire.StageFailed(
            code=_INTERNAL,
            reason="ENGINE_STEP_FAILED",
            message=type(error).__name__,
            retryable=True,
        )
        members = [chunk.sequence for chunk in plan.chunks]
        members += list(self._loop.streams.batch.sequences) if plan.decode else []
        members += [plan.alone] if plan.alone is not None else []
        for sequence in members:
            self._loop.end(sequence, "failed", failed=failed)
