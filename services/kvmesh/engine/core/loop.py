"""The engine thread: commands, transfers, steps. It owns everything.

One turn: take what came in, choose a step, run it, say what it brought. With
nothing to do the thread waits on one thing, which a command or a transfer
ends. What a step is stands in steps.py; how attempts go on and end, here.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmesh.engine.contract import (
    AttemptId,
    EngineLoad,
    OutputSink,
    Placement,
    StepOutput,
    StepSample,
)
from kvmesh.engine.core.admission import Admission
from kvmesh.engine.core.answers import Answers
from kvmesh.engine.core.blocks import BlockPool, Hold
from kvmesh.engine.core.hand_off import HandOffs
from kvmesh.engine.core.hand_over import HandOvers
from kvmesh.engine.core.queue import PromptQueue
from kvmesh.engine.core.runner import Runner, Sampled
from kvmesh.engine.core.sequence import Sequence, State
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.engine.core.shares import Shares
from kvmesh.engine.core.steps import Clock, Steps
from kvmesh.engine.core.streams import Streams
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

if TYPE_CHECKING:
    from kvmesh._router import TransferNode

_log = logging.getLogger(__name__)


class _Nobody:
    """Hears what an engine says that was not started."""

    def begin_step(self, predicted_ms: float) -> None:
        """Nothing."""

    def step(self, output: StepOutput) -> None:
        """Nothing."""

    def ended(self) -> None:
        """Nothing."""


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
        self.sink: OutputSink = _Nobody()
        """Set before the thread starts."""
        self.shares = Shares()
        self.sequences: dict[AttemptId, Sequence] = {}
        self.hand_offs = HandOffs(node, pool, settings.adapters) if node is not None else None
        self.node = node
        self.clock = clock
        self._inbox: deque[Callable[[EngineLoop], None]] = deque()
        self._wake = threading.Event()
        self.closing = False
        self._answers = Answers()
        # Routers are told of an idle engine, too.
        self._load_changed = True
        self.queue = PromptQueue(pool, settings, self._begin, self._may_lose_room)
        self.admission = Admission(self, settings, max_logprobs)
        self.streams = Streams(self, pool, settings)
        self.hand_overs = HandOvers(self, settings)
        self.steps = Steps(self, runner, settings, model, clock)

    @property
    def transfer_address(self) -> str:
        """Where peers reach the transfer node; empty: there is none."""
        return self.node.address if self.node is not None else ""

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
        if self.node is not None:
            self.node.wake()
        else:
            self._wake.set()

    def stop(self) -> None:
        """Ends the thread after the running layer."""
        self.closing = True
        self.wake()

    # -- the thread --------------------------------------------------------

    def run(self) -> None:
        """Works until `stop`."""
        try:
            while not self.closing:
                if self.take_in() or self._load_changed:
                    self.flush(0, None)
                if self.steps.run_streams():
                    continue
                plan = self.steps.plan(None)
                if plan is None:
                    self._wait()
                else:
                    self.steps.run(plan)
        except Exception:
            # The worker ends with it: an engine half alive helps nobody.
            _log.critical("engine thread failed", exc_info=True)
        finally:
            self._end_all()
            self.sink.ended()

    def _wait(self) -> None:
        if self._inbox or self.closing:
            return
        if self.node is not None:
            self.node.wait(None)
        else:
            self._wake.wait()
            self._wake.clear()

    def take_in(self) -> bool:
        """Commands and transfer events that have come. False: none has."""
        events = self.node.poll() if self.node is not None else ()
        if not (events or self._inbox or self.streams.stalled):
            return False
        while self._inbox:
            self._inbox.popleft()(self)
        for event in events:
            self.admission.transfer_event(event)
        if self.streams.stalled:
            self.streams.retry_stalled()
        self.count_shares()
        return True

    def count_shares(self) -> None:
        """Counts the work of each router anew."""
        self.streams.batch.sync()
        self.shares.count(self.sequences.values())
        self._load_changed = True

    def load(self) -> EngineLoad:
        """State now. From any thread."""
        running = self.steps.running
        since = running.since
        load = EngineLoad(self.pool.room(), self.shares.read(), running.number)
        if since:
            load.step += 1
            load.step_age_ms = max(0.0, (self.clock.now() - since) * 1000)
            load.step_predicted_ms = running.predicted_ms
        return load

    def flush(self, step: int, sample: StepSample | None) -> None:
        """Says what there is to say."""
        routers, cache = self._answers.take(), self.pool.journal.drain()
        if routers or cache is not None or sample is not None or self._load_changed:
            self._load_changed = False
            self.sink.step(StepOutput(step, routers, sample, self.load(), cache))

    # -- progress ----------------------------------------------------------

    def take_draw(self, sequence: Sequence, draw: Sampled) -> inference.FinishReason | None:
        """One token of one stream, outside of the columns."""
        index = len(sequence.output_ids)
        sequence.output_ids.append(draw.token_id)
        logprobs = [] if draw.logprobs is None else [draw.logprobs]
        sequence.logprobs.extend(logprobs)
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
        if sequence.state is State.DECODING:
            # What it computed stays as prefix.
            self.streams.batch.sync()
            sequence.computed = sequence.length - 1
            self.store(sequence)
        if sequence.trace is not None:
            sequence.trace.ended(self.clock.now(), sequence.made, self.steps.log)
        self._answers.end(sequence, **end)
        del self.sequences[sequence.id]
        was = sequence.state
        sequence.state = State.ENDED
        self.queue.remove(sequence)
        if was is State.DECODING:
            if sequence in self.streams.batch.sequences:
                self.streams.batch.leave((sequence,))
            self.hand_overs.ended(sequence)
            for group in (self.streams.suspects, self.streams.stalled, self.streams.came):
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
        if self.node is not None:
            self.node.close()
        self.sequences.clear()
