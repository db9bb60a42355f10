"""What a step brings for each router, put together."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from kvmesh.engine.contract import RouterStep, TokenColumns, integers
from kvmesh.engine.core.sequence import Sequence
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire


class Answers:
    """Openings, tokens and ends since the last `take`."""

    def __init__(self) -> None:
        self._routers: dict[str, RouterStep] = {}

    def _router(self, key: str) -> RouterStep:
        step = self._routers.get(key)
        if step is None:
            step = self._routers[key] = RouterStep()
        return step

    def reserved(self, sequence: Sequence, held: int, reserved: int) -> None:
        """The placement will run. Tokens held here, and tokens that room is held for."""
        opening = sequence.id.opening(sequence.stage)
        opening.reserved.tokens_held = held
        opening.reserved.tokens_reserved = reserved
        self._router(sequence.router).openings.append(opening)

    def refused(
        self, sequence: Sequence, reason: wire.RefusalReason, message: str, field: str = ""
    ) -> None:
        """The placement will not run here; `field` of the request is what is lacking."""
        opening = sequence.id.opening(sequence.stage)
        opening.refused.reason = reason
        opening.refused.message = message
        opening.refused.field = field
        self._router(sequence.router).openings.append(opening)

    def opening(self, router: str, opening: wire.Opening) -> None:
        """A finished answer to a Place."""
        self._router(router).openings.append(opening)

    def columns(self, router: str, columns: TokenColumns) -> None:
        """Tokens of all decoding streams of a router."""
        step = self._router(router)
        step.tokens = columns if step.tokens is None else _joined(step.tokens, columns)

    def tokens(
        self,
        sequence: Sequence,
        first_index: int,
        ids: Seq[int],
        logprobs: Seq[inference.TokenLogprobs] = (),
    ) -> None:
        """Tokens of one stream."""
        if not ids:
            return
        identity = sequence.id
        rows = [wire.RowLogprobs(row=0, tokens=logprobs)] if logprobs else []
        self.columns(
            sequence.router,
            TokenColumns(
                identity.generation, [identity.owner], [identity.attempt], [first_index],
                [len(ids)], list(ids), logprobs=rows,
            ),
        )  # fmt: skip

    def logprobs(self, sequence: Sequence, row: int, logprobs: inference.TokenLogprobs) -> None:
        """Log-probabilities of a row of the router's columns."""
        columns = self._router(sequence.router).tokens
        if columns is None:
            raise AssertionError("log-probabilities without tokens")
        columns.logprobs = [*columns.logprobs, wire.RowLogprobs(row=row, tokens=[logprobs])]

    def end(self, sequence: Sequence, **end: Any) -> None:
        """The one end of a stage; `end` is one field of StageEnd's `end`."""
        message = sequence.id.stage_end(sequence.stage, sequence.timings(), **end)
        self._router(sequence.router).ends.append(message)

    def take(self) -> dict[str, RouterStep]:
        """All of it, by router session."""
        routers, self._routers = self._routers, {}
        return routers


def _joined(first: TokenColumns, second: TokenColumns) -> TokenColumns:
    owners, more = integers(first.owners), integers(second.owners)
    moved = [
        wire.RowLogprobs(row=row.row + len(owners), tokens=row.tokens) for row in second.logprobs
    ]
    return TokenColumns(
        first.generations + second.generations,
        owners + more,
        integers(first.attempts) + integers(second.attempts),
        _indices(first) + _indices(second),
        integers(first.counts) + integers(second.counts),
        integers(first.ids) + integers(second.ids),
        logprobs=[*first.logprobs, *moved],
    )


def _indices(columns: TokenColumns) -> list[int]:
    return [index + columns.index_offset for index in integers(columns.first_indices)]
