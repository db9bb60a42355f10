"""A runner without weights: real blocks, real time, made-up tokens."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmesh._router import KvPool, SimStreams
from kvmesh.engine.core.runner import DecodeRows, PacedSteps, Sampled, Slice
from kvmesh.engine.core.step_model import StepLoad, predict_ms
from kvmesh.engine.sim.content import FIRST_STATE, TOKEN, U64, Content, K, mix
from kvmesh.engine.sim.settings import PROFILES, SimSettings
from kvmesh.engine.sim.vocabulary import end_of_text_ids
from kvmesh.v1 import worker_pb2 as wire

_REMEMBERED = 4
"""Batches of sequences whose running sums are kept; others are read from their blocks. Nobody says
when a sequence is over, so that all of these are there once so many came."""
_LOOK_S = 0.01
"""How often a stuck engine looks whether it still is."""

_SLOW = 10
"""How many times as long steps take while they are told to be slow."""


class SimClock(Protocol):
    """Time that steps take; tests put another one in."""

    def now(self) -> float:
        """Now, seconds."""

    def sleep_until(self, moment: float) -> None:
        """Lets time pass. The time of a step is part of what is simulated."""


class WallClock:
    """Real time."""

    now = staticmethod(time.monotonic)
    """Now, seconds."""

    def sleep_until(self, moment: float) -> None:
        """Sleeps, without the GIL."""
        left = moment - time.monotonic()
        if left > 0:
            time.sleep(left)


class SimRunner:
    """Implements `ColumnRunner`."""

    def __init__(self, settings: SimSettings, clock: SimClock | None = None) -> None:
        self._settings = settings
        self._clock = clock or WallClock()
        self._profile = PROFILES[settings.profile]
        self._size = settings.block_tokens
        self._content = Content(settings.block_bytes // settings.block_tokens // 8)
        self._ends = end_of_text_ids()
        self._vocabulary = range(max(self._ends) + 1, settings.vocabulary)
        self._words: U64 = np.empty((0, 0, 0), np.uint64)
        # What was computed here, by sequence: (next position, state, reading).
        self._known: dict[int, tuple[int, int, int]] = {}
        self._streams: SimStreams | None = None

    @property
    def block_tokens(self) -> int:
        """KV block size in tokens."""
        return self._size

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self._settings.block_bytes

    @property
    def layers(self) -> int:
        """Pauses of a step."""
        return self._profile.layers

    @property
    def vocabulary(self) -> range:
        """Ids that are drawn, those that end a text apart."""
        return self._vocabulary

    def compatibility(self) -> wire.KvCompatibility:
        """What transfer partners must agree on."""
        name = f"sim {self._settings.vocabulary} {self._settings.block_bytes}"
        return wire.KvCompatibility(
            model_digest=hashlib.sha256(name.encode()).hexdigest(),
            dtype="uint64",
            format=1,
            layers=self._profile.layers,
            kv_heads=1,
            head_size=self._content.words,
        )

    def bind(self, pool: KvPool) -> None:
        """Sees the pool as [block, token, word]."""
        words: U64 = np.frombuffer(memoryview(pool), dtype=np.uint64)
        self._words = words.reshape(-1, self._size, self._content.words)
        content = self._content
        self._streams = SimStreams(
            pool,
            state_factor=K,
            token_factor=TOKEN,
            spread=content.spread.tolist(),
            gain=int(content.gain),
            first_token=self._vocabulary.start,
            tokens=len(self._vocabulary),
            end_of_text=self._settings.end_of_text,
            end_id=self._ends[-1],
            block_tokens=self._size,
        )
        self._joined = _Joined(0, [], self._streams, 0.0, 0.0)

    def close(self) -> None:
        """Lets the pool go."""
        self._words = np.empty((0, 0, 0), np.uint64)
        self._streams = None
        self._known.clear()

    # -- steps -------------------------------------------------------------

    def forward(self, batch: Sequence[Slice]) -> Generator[None, None, list[Sampled | None]]:
        """Takes the time of a batch, layer by layer; then writes and draws."""
        load = StepLoad()
        for piece in batch:
            self._count(load, piece)
        yield from self._take_time(load)
        return [self._compute(piece) for piece in batch]

    def forward_columns(
        self, batch: Sequence[Slice], rows: DecodeRows
    ) -> Generator[None, None, tuple[list[Sampled | None], bytes]]:
        """As `forward`, with decoding streams by columns."""
        if not self._settings.instant:
            load = StepLoad(decode_batch=len(rows.keys), decode_context=rows.context)
            for piece in batch:
                self._count(load, piece)
            yield from self._take_time(load)
        else:
            self._suffer()
            if batch:
                yield
        return [self._compute(piece) for piece in batch], self._decode(rows)

    def decode_columns(self, rows: DecodeRows) -> bytes:
        """Takes the time of a step of decoding streams alone; then writes and draws."""
        joined = self._joined
        if joined.composition != rows.composition:
            joined = self._join(rows)
        if not self._settings.instant:
            seconds = joined.base_s + joined.context_s * rows.context
            self._sleep(seconds)
        self._suffer()
        return joined.streams.step(rows.ids, rows.tables)

    def paced(self, rows: DecodeRows) -> PacedSteps | None:
        """As `ColumnRunner.paced`."""
        joined = self._joined
        if joined.composition != rows.composition:
            joined = self._join(rows)
        settings = self._settings
        if settings.instant or not isinstance(self._clock, WallClock):
            return None
        if settings.stuck_while or settings.out_of_memory_while:
            return None
        if self._is_slow():
            # Nobody would tell those steps when that is over.
            return None
        return PacedSteps(joined.streams, (joined.base_s, joined.context_s))

    @staticmethod
    def _count(load: StepLoad, piece: Slice) -> None:
        if len(piece.ids) == 1 and piece.sample is not None:
            load.decode_batch += 1
            load.decode_context += piece.start + 1
        else:
            load.add_chunk(piece.start, len(piece.ids))

    def _take_time(self, load: StepLoad) -> Generator[None, None, None]:
        if self._settings.instant:
            self._suffer()
            yield
            return
        layers = self._profile.layers
        layer_s = predict_ms(self._profile.model, load) / 1000 / self._settings.speed / layers
        if not load.prefill_tokens:
            # Nothing can stop it, so its layers are one.
            layer_s, layers = layer_s * layers, 1
        for _ in range(layers):
            self._sleep(layer_s)
            self._suffer()
            yield

    def _sleep(self, seconds: float) -> None:
        if self._is_slow():
            seconds *= _SLOW
        self._clock.sleep_until(self._clock.now() + seconds)

    def _is_slow(self) -> bool:
        slow = self._settings.slow_while
        return bool(slow) and os.path.exists(slow)

    def _suffer(self) -> None:
        """What a step is told to suffer."""
        stuck, starved = self._settings.stuck_while, self._settings.out_of_memory_while
        while stuck and os.path.exists(stuck):
            time.sleep(_LOOK_S)
        if starved and os.path.exists(starved):
            raise MemoryError

    # -- contents ----------------------------------------------------------

    def _before(self, key: int, position: int, blocks: npt.NDArray[np.uint32]) -> tuple[int, int]:
        """State and reading before a position: remembered, or read from the blocks."""
        if position == 0:
            return FIRST_STATE, 0
        known = self._known.get(key)
        if key and known is not None and known[0] == position:
            return known[1], known[2]
        words = self._words[blocks[: -(-position // self._size)]]
        words = words.reshape(-1, self._content.words)[:position]
        return int(words[-1, 0]), self._content.read(words)

    def _remember(self, key: int, position: int, state: int, reading: int) -> None:
        known = self._known
        known.pop(key, None)
        known[key] = (position, state, reading)
        if len(known) > _REMEMBERED * self._settings.max_batch:
            del known[next(iter(known))]

    def _compute(self, piece: Slice) -> Sampled | None:
        if self._settings.dies_of and self._settings.dies_of in piece.ids:
            os.kill(os.getpid(), signal.SIGKILL)
        state, reading = self._before(piece.key, piece.start, piece.blocks)
        states = self._content.states(state, piece.ids)
        positions = np.arange(piece.start, piece.start + len(piece.ids))
        words = states[:, None] * self._content.spread
        self._words[piece.blocks[positions // self._size], positions % self._size] = words
        reading = (reading + self._content.read(words, piece.start)) % (1 << 64)
        state = int(states[-1])
        end = piece.start + len(piece.ids)
        self._remember(piece.key, end, state, reading)
        if piece.sample is None:
            return None
        tag = piece.tag if self._settings.attempt_tokens else 0
        number = mix(state ^ reading ^ tag)
        token = self._vocabulary.start + number % len(self._vocabulary)
        if self._settings.end_of_text and mix(number) % self._settings.end_of_text == 0:
            token = self._ends[-1]
        if token in piece.sample.banned_ids:
            token = self._vocabulary.start + number % len(self._vocabulary)
        return Sampled(token)

    def _decode(self, rows: DecodeRows) -> bytes:
        joined = self._joined
        if joined.composition != rows.composition:
            joined = self._join(rows)
        return joined.streams.step(rows.ids, rows.tables)

    def _join(self, rows: DecodeRows) -> _Joined:
        """States and readings of the new composition; new streams are read."""
        streams = self._streams
        if streams is None:
            raise RuntimeError("no pool is bound")
        for key, known in zip(self._joined.keys, streams.states(), strict=True):
            self._remember(key, *known)
        positions = (rows.firsts + rows.steps).tolist()
        tags = rows.tags if self._settings.attempt_tokens else [0] * len(rows.tags)
        streams.join(
            [
                (position, *self._before(key, position, table), tag)
                for key, position, table, tag in zip(
                    rows.keys, positions, rows.tables, tags, strict=True
                )
            ]
        )
        model, speed = self._profile.model, 1000 * self._settings.speed
        self._joined = _Joined(
            rows.composition,
            rows.keys,
            streams,
            (model.a_ms + model.d_ms * len(rows.keys)) / speed,
            model.e_ms / speed,
        )
        return self._joined


@dataclass(slots=True)
class _Joined:
    """Which streams decode together."""

    composition: int
    keys: list[int]
    streams: SimStreams
    base_s: float
    """Time of a step but for contexts, seconds."""
    context_s: float
    """Seconds a token of context."""
