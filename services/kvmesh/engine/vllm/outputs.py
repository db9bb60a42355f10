"""What a step of the core brought for each attempt: tokens, ends and hand-offs."""

from __future__ import annotations

from kvmesh.engine.contract import Stage
from kvmesh.engine.vllm import border, hand_off
from kvmesh.engine.vllm.answers import Answers
from kvmesh.engine.vllm.attempts import Attempt, Phase
from kvmesh.engine.vllm.border import CoreOutput
from kvmesh.engine.vllm.gate import Gate
from kvmesh.engine.vllm.hand_off import HandOff
from kvmesh.engine.vllm.placements import Placements
from kvmesh.engine.vllm.state import State
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

_INTERNAL, _UNAVAILABLE = 13, 14  # google.rpc.Code


class Outputs:
    """Used by the engine's thread alone."""

    def __init__(self, state: State, answers: Answers, gate: Gate, placements: Placements) -> None:
        self._state = state
        self._answers = answers
        self._gate = gate
        self._placements = placements

    def advance(self, attempt: Attempt, output: CoreOutput, now: float) -> None:
        """Takes what a step brought for an attempt."""
        for event in output.events or ():
            if event.type == border.SCHEDULED and not attempt.scheduled_at:
                attempt.scheduled_at = event.timestamp
        if output.prefill_stats is not None and not attempt.prompt_done_at:
            self._prompt_done(attempt, output.prefill_stats, now)
        ids = [*output.new_token_ids]
        if ids:
            attempt.phase, attempt.computed = Phase.DECODING, attempt.length
            if attempt.stage is not Stage.PREFILL:
                self._answers.tokens(attempt, ids, output.new_logprobs)
                attempt.next_index += len(ids)
                attempt.made += len(ids)
                attempt.length += len(ids)
        if output.finish_reason is not None:
            self._finish(attempt, output, now)

    def _prompt_done(self, attempt: Attempt, stats: border.PrefillStats, now: float) -> None:
        attempt.prompt_done_at = now
        attempt.cached_tokens = stats.num_local_cached_tokens
        attempt.computed_tokens = stats.num_computed_tokens
        if attempt.trace is not None and attempt.scheduled_at:
            attempt.trace.chunk_begins(attempt.scheduled_at)
            if stats.num_external_cached_tokens:
                tokens = stats.num_external_cached_tokens
                attempt.trace.add("transfer", attempt.scheduled_at, now, tokens, "hand-off")
            else:
                tokens = stats.num_computed_tokens
                attempt.trace.add("prefill_chunk", attempt.scheduled_at, now, tokens)

    def _finish(self, attempt: Attempt, output: CoreOutput, now: float) -> None:
        if attempt.trace is not None and attempt.prompt_done_at:
            attempt.trace.add("decode", attempt.prompt_done_at, now, attempt.made)
        self.leave(attempt)
        reason = output.finish_reason
        if reason not in (border.STOP, border.LENGTH):
            self._answers.end(attempt, failed=self.failure(output))
        elif attempt.stage is Stage.PREFILL:
            self._hand_off(attempt, output, now)
        else:
            stop = output.stop_reason
            finished = wire.StageFinished(
                reason=inference.FINISH_REASON_STOP
                if reason == border.STOP
                else inference.FINISH_REASON_LENGTH,
                stop_token_id=stop if isinstance(stop, int) else None,
            )
            self._answers.end(attempt, finished=finished)

    def failure(self, output: CoreOutput) -> wire.StageFailed:
        """Why a request ended without finishing."""
        aborted = output.finish_reason == border.ABORT
        return wire.StageFailed(
            code=_UNAVAILABLE if aborted else _INTERNAL,
            reason="ENGINE",
            message=f"vLLM ended the request: {'abort' if aborted else 'error'}",
            retryable=True,
        )

    def _hand_off(self, attempt: Attempt, output: CoreOutput, now: float) -> None:
        age_ms = attempt.waited_ms + (now - attempt.received_at) * 1000
        said = HandOff(output.kv_transfer_params, age_ms, self._placements.lease_ms)
        try:
            payload = hand_off.pack(said)
        except hand_off.HandOffError as error:
            self._answers.end(attempt, transfer_failed=wire.TransferFailed(message=str(error)))
            return
        engine = wire.EngineHandOff(connector=self._placements.connector, payload=payload)
        self._answers.end(attempt, handed_off=wire.HandedOff(engine=engine))

    def leave(self, attempt: Attempt) -> None:
        """An attempt has ended."""
        state = self._state
        state.attempts.pop(attempt.id, None)
        state.by_request.pop(attempt.request_id, None)
        self._gate.remove(attempt)
