"""The streams that decode, as columns that last from step to step.

A step of 64 streams may cost tens of microseconds of Python, not some a
token. So all that is the same as in the step before is kept: the columns of
the runner, the columns of the answer, and a calendar that says at which step
which stream fills its blocks or reaches its limit. Blocks that it fills before
are cached then, or when it ends. Nothing is looked at a stream
a step: the new tokens are one column of a table, and a stream's own list gets
them when somebody is about to read it (`sync`).
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvmesh.engine.contract import RouterStep, TokenColumns
from kvmesh.engine.core.runner import DecodeRows, Slice
from kvmesh.engine.core.sequence import Sequence

U32 = npt.NDArray[np.uint32]

_SPARE_BLOCKS = 8
"""Columns of a block table that are kept for growth."""

_KEPT_STEPS = 64
"""Steps whose tokens are kept by columns before all streams get theirs."""


_ONE = np.uint32(1)


class _RouterRows:
    """Rows of one router: what its answers have in every step."""

    __slots__ = ("columns", "first_indices", "rows")

    def __init__(self, rows: list[int], sequences: list[Sequence], everything: bool) -> None:
        members = [sequences[row] for row in rows]
        self.columns = TokenColumns(
            generations=b"".join(s.id.generation for s in members),
            owners=_packed(s.id.owner for s in members),
            attempts=_packed(s.id.attempt for s in members),
            counts=_packed([1] * len(rows)),
        )
        self.first_indices = np.array([len(s.output_ids) for s in members], np.uint32)
        self.rows = None if everything else np.array(rows)

    def tell(self, tokens: U32) -> None:
        """Makes `columns` the answer of a step, and advances the indices."""
        self.columns.first_indices = self.first_indices.tobytes()
        self.columns.ids = (tokens if self.rows is None else tokens[self.rows]).tobytes()
        self.first_indices += _ONE


def _packed(numbers: Iterable[int]) -> bytes:
    return array("I", numbers).tobytes()


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
        self.answers: dict[str, RouterStep] = {}
        """What the newest step brought (`tell`), by router."""
        self._routers: list[_RouterRows] = []
        self._dirty = False
        self._tick = 0
        self._calendar: dict[int, list[int]] = {}
        self._made: U32 = np.empty((_KEPT_STEPS, 0), np.uint32)
        self._kept = 0
        """Steps in `_made`."""
        self._synced: list[int] = []
        """Of a row: steps in `_made` that its stream has."""
        self._members: list[Sequence] = []
        """The streams by row, also where some have left since."""
        self._stop_ids: list[int] = []
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
        self.sync()
        self.sequences.append(sequence)
        self._dirty = True

    def leave(self, gone: Iterable[Sequence]) -> None:
        """Takes streams out. They have all their tokens."""
        out = {sequence.key for sequence in gone}
        self.sync()
        self.sequences = [s for s in self.sequences if s.key not in out]
        self._dirty = True

    def prepare(self) -> None:
        """Brings the columns up to date. Called before each step."""
        if self._dirty:
            self._rebuild()

    def _rebuild(self) -> None:
        sequences, size = self.sequences, self._block_tokens
        self._made = np.empty((_KEPT_STEPS, len(sequences)), np.uint32)
        self._kept = 0
        self._synced = [0] * len(sequences)
        self._members = list(sequences)
        self._dirty = False
        self._tick = 0
        self._calendar = {}
        positions = [s.length - 1 for s in sequences]
        width = max((len(s.blocks) for s in sequences), default=0) + _SPARE_BLOCKS
        tables = np.zeros((len(sequences), width), np.uint32)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.blocks)] = sequence.blocks
            self._note(row, len(sequence.blocks) * size - positions[row])
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
        self.context = sum(positions) + len(positions)
        self.stop_ids = frozenset().union(*(s.stop_ids for s in sequences))
        self._stop_ids = sorted(self.stop_ids)
        self.plain = all(s.plain for s in sequences)
        self.itl_target_ms = min(
            (s.itl_target_ms for s in sequences if s.itl_target_ms), default=0.0
        )
        by_router: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            by_router.setdefault(sequence.router, []).append(row)
        parts = {
            router: _RouterRows(rows, sequences, len(rows) == len(sequences))
            for router, rows in by_router.items()
        }
        self._routers = list(parts.values())
        self.answers = {router: RouterStep(tokens=part.columns) for router, part in parts.items()}

    def tell(self, tokens: U32) -> None:
        """Makes `answers` those of a step, once for each `advance`."""
        for part in self._routers:
            part.tell(tokens)

    @property
    def steady(self) -> bool:
        """Whether there are streams, as in the step before, and all are plain."""
        return not self._dirty and self.plain and bool(self.sequences)

    def _note(self, row: int, steps: int) -> None:
        self._calendar.setdefault(self._tick + steps, []).append(row)

    # -- tokens of a stream ------------------------------------------------

    def sync(self) -> None:
        """Gives all streams the tokens that they have not yet."""
        if not self._kept:
            return
        # Somebody may have left the list of streams, not yet the columns.
        for row, sequence in enumerate(self._members):
            self._give(row, sequence)
        self._kept = 0
        self._synced = [0] * len(self._members)

    def _give(self, row: int, sequence: Sequence) -> None:
        first = self._synced[row]
        if first < self._kept:
            sequence.output_ids.extend(self._made[first : self._kept, row].tolist())
            self._synced[row] = self._kept

    def slices(self) -> list[Slice]:
        """The streams as slices, for runners and samplings that need them."""
        self.sync()
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

    def advance(self, tokens: U32) -> list[int]:
        """Takes the new token of each row. Returns rows that need a look.

        Those filled their blocks, reached their limit or may have drawn a stop id;
        the answer may name a row twice. Their streams have all their tokens.
        """
        if self._kept == _KEPT_STEPS:
            self.sync()
        self._made[self._kept] = tokens
        self._kept += 1
        self.rows.ids[:] = tokens
        self.rows.positions += 1
        self.context += len(tokens)
        self._tick += 1
        due = self._calendar.pop(self._tick, [])
        if not self.plain:
            self.sync()
            self.plain = all(s.plain for s in self.sequences)
            return list(range(len(tokens)))
        if self._stop_ids:
            due = due + self._drew_stop_id(tokens)
        for row in due:
            self._give(row, self._members[row])
        return due

    def _drew_stop_id(self, tokens: U32) -> list[int]:
        hits: list[int] = []
        for stop_id in self._stop_ids:
            where = tokens == stop_id
            if where.any():
                hits += np.flatnonzero(where).tolist()
        return hits

    def grown(self, row: int, sequence: Sequence, first: int) -> None:
        """Takes over a stream's blocks from `first` on, after they changed."""
        blocks, tables = sequence.blocks, self.rows.tables
        if len(blocks) > tables.shape[1]:
            wider = np.zeros((tables.shape[0], len(blocks) + _SPARE_BLOCKS), np.uint32)
            wider[:, : tables.shape[1]] = tables
            self.rows.tables = tables = wider
        tables[row, first : len(blocks)] = blocks[first:]
        self._note(row, len(blocks) * self._block_tokens - sequence.computed)
