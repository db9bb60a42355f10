"""A batch as index tensors: made once a step, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.engine.core.runner import Slice
from kvmesh.engine.torch.rope import Rope


@dataclass(frozen=True, slots=True)
class PrefillSlice:
    """A slice of several tokens: attends by itself."""

    begin: int
    """First row of the batch."""
    end: int
    length: int
    """Tokens of the sequence up to the last row."""
    slots: npt.NDArray[np.uint32]
    """[n] slots of the pool."""
    blocks: torch.Tensor
    """The same where the model computes, int64."""

    @property
    def start(self) -> int:
        """Tokens that precede the slice."""
        return self.length - (self.end - self.begin)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """All slices of one token: attend together."""

    rows: npt.NDArray[np.uint32]
    """[b] rows of the batch, rising."""
    begins: npt.NDArray[np.uint32]
    """[b] where each block table begins in `tables`."""
    tables: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint32]
    """[b] tokens of each sequence, the new one included."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What each layer needs to know of a batch of n rows."""

    ids: torch.Tensor
    """[n] int64."""
    cos: torch.Tensor
    """[n, head_size / 2]."""
    sin: torch.Tensor
    slots: torch.Tensor
    """[n] int64: pool slot x block_tokens + place within the block."""
    prefill: tuple[PrefillSlice, ...]
    decode: DecodeRows | None
    sampled: torch.Tensor
    """[s] int64 rows whose next token is drawn, in the order of the slices."""


def make_plan(batch: Sequence[Slice], block_tokens: int, rope: Rope, device: torch.device) -> Plan:
    """Lays the slices out one after the other as rows."""
    begins = np.cumsum([0, *(len(piece.ids) for piece in batch)])
    positions = np.concatenate(
        [np.arange(piece.start, piece.start + len(piece.ids)) for piece in batch]
    )
    slots = np.concatenate([_slots(piece, block_tokens) for piece in batch])
    ids = np.concatenate([piece.ids for piece in batch]).astype(np.int64)
    cos, sin = rope.angles(torch.from_numpy(positions).to(device))
    sampled = [begins[i + 1] - 1 for i, piece in enumerate(batch) if piece.sample is not None]
    return Plan(
        ids=torch.from_numpy(ids).to(device),
        cos=cos,
        sin=sin,
        slots=torch.from_numpy(slots).to(device),
        prefill=tuple(
            _prefill(piece, int(begins[i]), block_tokens, device)
            for i, piece in enumerate(batch)
            if len(piece.ids) > 1
        ),
        decode=_decode(batch, begins, block_tokens),
        sampled=torch.tensor(sampled, dtype=torch.int64, device=device),
    )


def _slots(piece: Slice, block_tokens: int) -> npt.NDArray[np.int64]:
    positions = np.arange(piece.start, piece.start + len(piece.ids))
    blocks = piece.blocks[positions // block_tokens].astype(np.int64)
    return blocks * block_tokens + positions % block_tokens


def _prefill(piece: Slice, begin: int, block_tokens: int, device: torch.device) -> PrefillSlice:
    rows = len(piece.ids)
    length = piece.start + rows
    used = -(-length // block_tokens)
    slots = piece.blocks[:used]
    blocks = torch.from_numpy(slots.astype(np.int64)).to(device)
    return PrefillSlice(begin, begin + rows, length, slots, blocks)


def only_rows(batch: Sequence[Slice], block_tokens: int) -> DecodeRows | None:
    """The batch as rows, where each slice is of one token."""
    if any(len(piece.ids) != 1 for piece in batch):
        return None
    return _decode(batch, np.arange(len(batch)), block_tokens)


def _decode(
    batch: Sequence[Slice], begins: npt.NDArray[np.int64], block_tokens: int
) -> DecodeRows | None:
    single = [i for i, piece in enumerate(batch) if len(piece.ids) == 1]
    if not single:
        return None
    lengths = np.array([batch[i].start + 1 for i in single], dtype=np.uint32)
    used = -(-lengths.astype(np.int64) // block_tokens)
    tables = np.concatenate(
        [batch[i].blocks[:count] for i, count in zip(single, used, strict=True)]
    )
    return DecodeRows(
        rows=begins[single].astype(np.uint32),
        begins=(np.cumsum(used) - used).astype(np.uint32),
        tables=np.ascontiguousarray(tables, dtype=np.uint32),
        lengths=lengths,
    )
