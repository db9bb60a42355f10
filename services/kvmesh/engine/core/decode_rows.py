"""The streams that decode, as columns that last from step to step.

A step of 64 streams may cost tens of microseconds of Python, not some a
token. So all that is the same as in the step before is kept: the columns of
the runner, the columns of the answer, and calendars that say at which step
which stream fills its blocks and which reaches its limit. Blocks that it fills
before are cached then, or when it ends. Whoever looks at one stream that has
filled its blocks looks at all that soon will (`fill_soon`): so the steps of many
streams, each of which fills a block at a time of its own, go on without a look.
Nothing is looked at a stream a step: the new tokens are one column of a table,
and a stream's own list gets them when somebody is about to read it (`sync`).
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable

import numpy as np

from kvmesh.engine.contract import RouterStep, TokenColumns
from kvmesh.engine.core.runner import DecodeRows, Slice
from kvmesh.engine.core.sequence import Sequence
from kvmesh.engine.core.step_model import StepLoad

_SPARE_BLOCKS = 8
"""Columns of a block table that are kept for growth."""

_NONE: list[int] = []

_KEPT_STEPS = 64
"""Steps whose tokens are kept by columns before all streams get theirs."""


class _RouterRows:
    """Rows of one router: what its answers have in every step."""

    __slots__ = ("columns", "rows")

    def __init__(self, rows: list[int], sequences: list[Sequence], everything: bool) -> None:
        members = [sequences[row] for row in rows]
        self.columns = TokenColumns(
            generations=b"".join(s.id.generation for s in members),
            owners=_packed(s.id.owner for s in members),
            attempts=_packed(s.id.attempt for s in members),
            first_indices=_packed(len(s.output_ids) for s in members),
            counts=_packed([1] * len(rows)),
        )
        self.rows = None if everything else np.array(rows)


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
        self.steady = False
        """Whether there are streams, as in the step before, and all are plain."""
        self.itl_target_ms = 0.0
        """Tightest target that a stream names; 0: none does."""
        self.answers: dict[str, RouterStep] = {}
        """What the newest step brought (`tell`), by router."""
        self._routers: list[_RouterRows] = []
        self._dirty = False
        self._full: dict[int, list[int]] = {}
        """By step: rows whose blocks are full after it."""
        self._limits: dict[int, list[int]] = {}
        """By step: rows that end with it."""
        self._watched: dict[int, list[int]] = {}
        """By step: rows that somebody else wants to look at after it."""
        self._made: list[bytes] = []
        """Tokens of the last steps, packed."""
        self._synced: list[int] = []
        """Of a row: steps in `_made` that its stream has."""
        self._members: list[Sequence] = []
        """The streams by row, also where some have left since."""
        self._stop_ids: list[bytes] = []
        self.rows = self._empty()

    def __len__(self) -> int:
        return len(self.sequences)

    def load(self) -> StepLoad:
        """What a step of these streams alone has to do."""
        return StepLoad(decode_batch=len(self), decode_context=self.rows.context)

    def _empty(self) -> DecodeRows:
        return DecodeRows(
            next(self._compositions),
            [],
            [],
            np.empty(0, np.int64),
            np.empty((0, 0), np.uint32),
            b"",
            0,
        )

    def join(self, sequence: Sequence) -> None:
        """Adds a stream whose newest token is not computed yet."""
        self.sync()
        self.sequences.append(sequence)
        self._dirty, self.steady = True, False

    def leave(self, gone: Iterable[Sequence]) -> None:
        """Takes streams out. They have all their tokens."""
        out = {sequence.key for sequence in gone}
        self.sync()
        self.sequences = [s for s in self.sequences if s.key not in out]
        self._dirty, self.steady = True, False

    def prepare(self) -> None:
        """Brings the columns up to date. Called before each step."""
        if self._dirty:
            self._rebuild()

    def _rebuild(self) -> None:
        sequences, size = self.sequences, self._block_tokens
        self._made = []
        self._synced = [0] * len(sequences)
        self._members = list(sequences)
        self._dirty = False
        self._full, self._limits, self._watched = {}, {}, {}
        positions = [s.length - 1 for s in sequences]
        width = max((len(s.blocks) for s in sequences), default=0) + _SPARE_BLOCKS
        tables = np.zeros((len(sequences), width), np.uint32)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.blocks)] = sequence.blocks
        self.rows = DecodeRows(
            next(self._compositions),
            [s.key for s in sequences],
            [s.tag for s in sequences],
            np.array(positions, np.int64),
            tables,
            _packed(s.output_ids[-1] if s.output_ids else s.base[-1] for s in sequences),
            sum(positions) + len(positions),
        )
        for row, sequence in enumerate(sequences):
            self._note(self._full, row, len(sequence.blocks) * size - positions[row])
            self._note(self._limits, row, sequence.limit - sequence.length)
            if sequence.look_at:
                self._note(self._watched, row, max(1, sequence.look_at - sequence.length))
        self.stop_ids = frozenset().union(*(s.stop_ids for s in sequences))
        self._stop_ids = [_packed([stop_id]) for stop_id in sorted(self.stop_ids)]
        self.plain = all(s.plain for s in sequences)
        self.steady = self.plain and bool(sequences)
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

    def tell(self, tokens: bytes) -> None:
        """Makes `answers` those of a step, once after each `advance`."""
        made = self.rows.steps - 1
        for part in self._routers:
            columns = part.columns
            columns.index_offset = made
            columns.ids = tokens
            if part.rows is not None:
                columns.ids = np.frombuffer(tokens, np.uint32)[part.rows].tobytes()

    @property
    def router_rows(self) -> list[list[int]]:
        """Rows of each router, in the order of `answers`."""
        everything = list(range(len(self._members)))
        return [everything if p.rows is None else p.rows.tolist() for p in self._routers]

    def steps_ahead(self) -> tuple[int, bool]:
        """Steps, at least one, before which no row needs a look, as far as is known.

        True: after the last of them one does.
        """
        if len(self._made) == _KEPT_STEPS:
            self.sync()
        now, most = self.rows.steps, _KEPT_STEPS - len(self._made)
        calendars = (self._full, self._limits, self._watched)
        noted = (step for by_step in calendars for step in by_step if step > now)
        ahead = min(noted, default=now + most + 1) - now
        return min(ahead, most), ahead <= most

    def take(self, steps: list[bytes]) -> None:
        """Takes steps that none of the rows had to be looked at after."""
        rows = self.rows
        self._made += steps
        rows.ids = steps[-1]
        rows.context += len(steps) * len(self._members)
        rows.steps += len(steps)

    def next_indices(self) -> None:
        """Makes `answers` those of the step to come, without its tokens."""
        for part in self._routers:
            part.columns.index_offset = self.rows.steps
            part.columns.ids = b""

    def _note(self, by_step: dict[int, list[int]], row: int, steps: int) -> None:
        by_step.setdefault(self.rows.steps + steps, []).append(row)

    def watch(self, sequence: Sequence, steps: int) -> None:
        """Has a stream looked at after so many more steps. It has all its tokens."""
        sequence.look_at = sequence.length + steps
        if not self._dirty and sequence in self._members:
            self._note(self._watched, self._members.index(sequence), steps)

    def stored(self, sequence: Sequence, first: int) -> None:
        """Takes over a stream's blocks from `first` on: cached ones may stand for them."""
        if not self._dirty and sequence in self._members and sequence.stored > first:
            row = self._members.index(sequence)
            self.rows.tables[row, first : len(sequence.blocks)] = sequence.blocks[first:]

    # -- tokens of a stream ------------------------------------------------

    def sync(self) -> None:
        """Gives all streams the tokens that they have not yet."""
        if self._made:
            self._give(range(len(self._members)))
            self._made.clear()
            self._synced = [0] * len(self._members)

    def _give(self, rows: Iterable[int]) -> None:
        """Gives some streams their tokens."""
        made = np.frombuffer(b"".join(self._made), np.uint32).reshape(len(self._made), -1)
        for row in rows:
            first = self._synced[row]
            self._members[row].output_ids.extend(made[first:, row].tolist())
            self._synced[row] = len(made)

    def slices(self) -> list[Slice]:
        """The streams as slices, for runners and samplings that need them."""
        self.sync()
        rows = self.rows
        ids, positions = np.frombuffer(rows.ids, np.uint32), (rows.firsts + rows.steps).tolist()
        return [
            Slice(
                ids=ids[row : row + 1],
                start=position,
                blocks=rows.tables[row, : position // self._block_tokens + 1],
                sample=self.sequences[row].sample_spec(),
                tag=self.sequences[row].tag,
                key=self.sequences[row].key,
            )
            for row, position in enumerate(positions)
        ]

    def advance(self, tokens: bytes) -> list[int]:
        """Takes the new token of each row, packed. Returns rows that need a look.

        Those filled their blocks, are watched, reached their limit or may have drawn a stop id;
        the answer may name a row twice. Their streams have all their tokens.
        """
        made, rows = self._made, self.rows
        if len(made) == _KEPT_STEPS:
            self.sync()
        made.append(tokens)
        rows.ids = tokens
        rows.context += len(self._members)
        rows.steps = step = rows.steps + 1
        due = self._limits.pop(step, _NONE)
        if step in self._full:
            due = due + self._full.pop(step)
        if step in self._watched:
            due = due + self._watched.pop(step)
        if not self.plain:
            self.sync()
            self.plain = self.steady = all(s.plain for s in self.sequences)
            return list(range(len(self._members)))
        for packed in self._stop_ids:
            # Mostly not there at all; what is found may lie across two ids.
            if packed in tokens:
                due = due + self._drew(packed, tokens)
        if due:
            self._give(due)
        return due

    @staticmethod
    def _drew(packed: bytes, tokens: bytes) -> list[int]:
        drawn = np.frombuffer(tokens, np.uint32) == np.frombuffer(packed, np.uint32)
        rows: list[int] = np.flatnonzero(drawn).tolist()
        return rows

    def fill_soon(self) -> list[int]:
        """Rows that fill their blocks soon; each is to be `grown`.

        Their streams have all their tokens.
        """
        until = self.rows.steps + _KEPT_STEPS
        rows = [row for step in self._full if step <= until for row in self._full[step]]
        self._full = {step: rows for step, rows in self._full.items() if step > until}
        if rows and self._made:
            self._give(rows)
        return rows

    def grown(self, row: int, sequence: Sequence, first: int) -> None:
        """Takes over a stream's blocks from `first` on, after they changed."""
        blocks, tables = sequence.blocks, self.rows.tables
        if len(blocks) > tables.shape[1]:
            wider = np.zeros((tables.shape[0], len(blocks) + _SPARE_BLOCKS), np.uint32)
            wider[:, : tables.shape[1]] = tables
            self.rows.tables = tables = wider
        tables[row, first : len(blocks)] = blocks[first:]
        self._note(self._full, row, len(blocks) * self._block_tokens - sequence.computed)
