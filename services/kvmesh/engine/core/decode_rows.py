"""The streams that decode, as columns that last from step to step.

A step of 64 streams may cost tens of microseconds of Python, not some a
token. So all that is the same as in the step before is kept: the columns of
the runner, the columns of the answer, and a calendar that says at which step
which stream fills a block or reaches its limit. Nothing is looked at a stream
a step but its new token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import numpy as np

from kvmesh.engine.contract import TokenColumns
from kvmesh.engine.core.runner import DecodeRows, Slice
from kvmesh.engine.core.sequence import Sequence

_SPARE_BLOCKS = 8
"""Columns of a block table that are kept for growth."""


class _RouterRows:
    """Rows of one router: what its answers have in every step."""

    __slots__ = ("attempts", "counts", "first_indices", "generations", "owners", "pick", "size")

    def __init__(self, rows: list[int], sequences: list[Sequence], everything: bool) -> None:
        members = [sequences[row] for row in rows]
        self.size = len(rows)
        self.generations = b"".join(s.id.generation for s in members)
        self.owners = [s.id.owner for s in members]
        self.attempts = [s.id.attempt for s in members]
        self.counts = [1] * len(rows)
        self.first_indices = [len(s.output_ids) for s in members]
        self.pick: Callable[[list[int]], Any] | None = None
        if not everything:
            # itemgetter of one index gives the item, not a tuple.
            self.pick = (
                itemgetter(*rows) if len(rows) > 1 else itemgetter(slice(rows[0], rows[0] + 1))
            )

    def columns(self, tokens: list[int]) -> TokenColumns:
        """The answer of a step; advances the indices."""
        firsts = self.first_indices
        self.first_indices = [index + 1 for index in firsts]
        return TokenColumns(
            self.generations,
            self.owners,
            self.attempts,
            firsts,
            self.counts,
            tokens if self.pick is None else self.pick(tokens),
        )


class DecodeBatch:
    """Streams that decode together."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._compositions = itertools.count(1)
        self.sequences: list[Sequence] = []
        self.stop_ids: frozenset[int] = frozenset()
        """Ids that end at least one of the streams."""
        self.plain = True
        """Whether all streams ask for the token alone."""
        self.context = 0
        """Sum of the context lengths in the next step."""
        self.itl_target_ms = 0.0
        """Tightest target that a stream names; 0: none does."""
        self.routers: dict[str, _RouterRows] = {}
        self._dirty = False
        self._tick = 0
        self._calendar: dict[int, list[int]] = {}
        self._outputs: list[list[int]] = []
        self.rows = self._empty()

    def __len__(self) -> int:
        return len(self.sequences)

    def _empty(self) -> DecodeRows:
        return DecodeRows(
            next(self._compositions),
            [],
            [],
            np.empty(0, np.uint32),
            np.empty(0, np.int64),
            np.empty((0, 0), np.uint32),
        )

    def join(self, sequence: Sequence) -> None:
        """Adds a stream whose newest token is not computed yet."""
        self.sequences.append(sequence)
        self._dirty = True

    def leave(self, gone: Iterable[Sequence]) -> None:
        """Takes streams out."""
        out = {sequence.key for sequence in gone}
        self.sequences = [s for s in self.sequences if s.key not in out]
        self._dirty = True

    def prepare(self) -> None:
        """Brings the columns up to date. Called before each step."""
        if self._dirty:
            self._rebuild()

    def _rebuild(self) -> None:
        sequences, size = self.sequences, self._block_tokens
        self._dirty = False
        self._tick = 0
        self._calendar = {}
        positions = [s.length - 1 for s in sequences]
        width = max((len(s.blocks) for s in sequences), default=0) + _SPARE_BLOCKS
        tables = np.zeros((len(sequences), width), np.uint32)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.blocks)] = sequence.blocks
            self._note(row, size - positions[row] % size)
            self._note(row, sequence.limit - sequence.length)
        self.rows = DecodeRows(
            next(self._compositions),
            [s.key for s in sequences],
            [s.tag for s in sequences],
            np.array(
                [s.output_ids[-1] if s.output_ids else s.base[-1] for s in sequences], np.uint32
            ),
            np.array(positions, np.int64),
            tables,
        )
        self._outputs = [s.output_ids for s in sequences]
        self.context = sum(positions) + len(positions)
        self.stop_ids = frozenset().union(*(s.stop_ids for s in sequences))
        self.plain = all(s.plain for s in sequences)
        self.itl_target_ms = min(
            (s.itl_target_ms for s in sequences if s.itl_target_ms), default=0.0
        )
        by_router: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            by_router.setdefault(sequence.router, []).append(row)
        self.routers = {
            router: _RouterRows(rows, sequences, len(rows) == len(sequences))
            for router, rows in by_router.items()
        }

    def _note(self, row: int, steps: int) -> None:
        self._calendar.setdefault(self._tick + steps, []).append(row)

    def slices(self) -> list[Slice]:
        """The streams as slices, for runners and samplings that need them."""
        ids, positions, tables = self.rows.ids, self.rows.positions.tolist(), self.rows.tables
        return [
            Slice(
                ids=ids[row : row + 1],
                start=position,
                blocks=tables[row, : position // self._block_tokens + 1],
                sample=self.sequences[row].sample_spec(),
                tag=self.sequences[row].tag,
                key=self.sequences[row].key,
            )
            for row, position in enumerate(positions)
        ]

    def advance(self, tokens: list[int]) -> list[int]:
        """Takes the new token of each row. Returns rows that need a look.

        Those filled a block, reached their limit or may have drawn a stop id;
        the answer may name a row twice.
        """
        for output, token in zip(self._outputs, tokens, strict=True):
            output.append(token)
        self.rows.ids[:] = tokens
        self.rows.positions += 1
        self.context += len(tokens)
        self._tick += 1
        due = self._calendar.pop(self._tick, [])
        if not self.plain:
            due = list(range(len(tokens)))
            self.plain = all(s.plain for s in self.sequences)
        elif not self.stop_ids.isdisjoint(tokens):
            due = due + [row for row, token in enumerate(tokens) if token in self.stop_ids]
        return due

    def grown(self, row: int, sequence: Sequence, first: int) -> None:
        """Takes over a stream's blocks from `first` on, after they changed."""
        blocks, tables = sequence.blocks, self.rows.tables
        if len(blocks) > tables.shape[1]:
            wider = np.zeros((tables.shape[0], len(blocks) + _SPARE_BLOCKS), np.uint32)
            wider[:, : tables.shape[1]] = tables
            self.rows.tables = tables = wider
        for place in range(first, len(blocks)):
            tables[row, place] = blocks[place]
        self._note(row, self._block_tokens)
