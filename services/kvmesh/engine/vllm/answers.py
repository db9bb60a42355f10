"""What a step brings for each router, put together by columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvmesh.engine.contract import RouterStep, TokenColumns
from kvmesh.engine.vllm.attempts import Attempt
from kvmesh.engine.vllm.border import LogprobRows
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire


@dataclass(slots=True)
class _Columns:
    generations: bytearray = field(default_factory=bytearray)
    owners: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    first_indices: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[wire.RowLogprobs] = field(default_factory=list)


class Answers:
    """Openings, tokens and ends since the last `take`."""

    def __init__(self) -> None:
        self._steps: dict[str, RouterStep] = {}
        self._columns: dict[str, _Columns] = {}

    def _step(self, router: str) -> RouterStep:
        step = self._steps.get(router)
        if step is None:
            step = self._steps[router] = RouterStep()
        return step

    def reserved(self, attempt: Attempt, reserved: int) -> None:
        """The placement will run; room is held for so many tokens."""
        opening = attempt.id.opening(attempt.stage)
        opening.reserved.tokens_held = attempt.held_tokens
        opening.reserved.tokens_reserved = reserved
        self._step(attempt.router).openings.append(opening)

    def refused(self, router: str, opening: wire.Opening, message: str, path: str = "") -> None:
        """The placement will not run here; `path` of the request is what is lacking."""
        opening.refused.reason = wire.REFUSAL_REASON_UNSUPPORTED
        opening.refused.message = message
        opening.refused.field = path
        self._step(router).openings.append(opening)

    def tokens(self, attempt: Attempt, ids: list[int], logprobs: LogprobRows | None) -> None:
        """New tokens of one stream."""
        columns = self._columns.get(attempt.router)
        if columns is None:
            columns = self._columns[attempt.router] = _Columns()
        generation, owner, number = attempt.id
        if logprobs is not None:
            wanted = attempt.wants_logprobs or 0
            entries = [token_logprobs(logprobs, position, wanted) for position in range(len(ids))]
            columns.logprobs.append(wire.RowLogprobs(row=len(columns.owners), tokens=entries))
        columns.generations += generation
        columns.owners.append(owner)
        columns.attempts.append(number)
        columns.first_indices.append(attempt.next_index)
        columns.counts.append(len(ids))
        columns.ids += ids

    def end(self, attempt: Attempt, **end: Any) -> None:
        """The one end of a stage; `end` is one field of StageEnd's `end`."""
        message = attempt.id.stage_end(attempt.stage, attempt.timings(), **end)
        self._step(attempt.router).ends.append(message)

    def take(self) -> dict[str, RouterStep]:
        """All of it, by router session."""
        for router, columns in self._columns.items():
            self._step(router).tokens = TokenColumns(
                bytes(columns.generations),
                columns.owners,
                columns.attempts,
                columns.first_indices,
                columns.counts,
                columns.ids,
                logprobs=columns.logprobs,
            )
        steps, self._steps, self._columns = self._steps, {}, {}
        return steps


def token_logprobs(rows: LogprobRows, position: int, wanted: int) -> inference.TokenLogprobs:
    """One position's: the first column is the token that was drawn."""
    ids, values = rows.logprob_token_ids[position], rows.logprobs[position]
    return inference.TokenLogprobs(
        # vLLM's float32 may be a hair over 0.
        logprob=min(0.0, float(values[0])),
        top_ids=[int(id) for id in ids[1 : wanted + 1]],
        top_logprobs=[min(0.0, float(value)) for value in values[1 : wanted + 1]],
    )
