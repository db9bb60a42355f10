"""The safetensors container: read where tensors lie, and write one tensor at a time.

Format: 8 bytes little-endian length of a JSON header, the header with dtype,
shape and byte range of each tensor, then the bytes. Writing tensor by tensor
keeps a conversion's memory at one tensor and gives it honest progress.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from kvmesh.models.errors import UnsupportedModelError

_MAX_HEADER_BYTES = 100 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies."""

    name: str
    dtype: str
    """As in the file: F32, F16, BF16, …"""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """From the beginning of the file, bytes."""
    size: int
    """Bytes."""


def weight_files(folder: Path) -> list[Path]:
    """Shards of a model: those of the index, or the single file."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
        for file in files:
            if file.parent.resolve() != folder.resolve():
                raise UnsupportedModelError(f"{INDEX} names a file outside its folder: {file.name}")
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.exists():
            raise UnsupportedModelError(f"{folder} lacks {file.name}")
    return files


def read_entries(file: Path) -> list[TensorEntry]:
    """Tensors of one file; raises `UnsupportedModelError` if it is damaged."""
    with file.open("rb") as stream:
        total = file.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if length > min(total - 8, _MAX_HEADER_BYTES):
            raise UnsupportedModelError(f"{file.name} is not a safetensors file, or is cut off")
        header = json.loads(stream.read(length))
    entries = []
    for name, field in header.items():
        if name == "__metadata__":
            continue
        begin, end = field["data_offsets"]
        if 8 + length + end > total:
            raise UnsupportedModelError(f"{file.name} is cut off: {name} ends beyond it")
        entries.append(
            TensorEntry(
                name, field["dtype"], tuple(field["shape"]), file, 8 + length + begin, end - begin
            )
        )
    return entries


def write_float32(
    path: Path,
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], npt.NDArray[np.float32]],
) -> Iterator[int]:
    """Writes tensors in the order given; yields the bytes written so far after each."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    names = []
    end = 0
    for name, shape in shapes:
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        names.append(name)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Padded so that tensors start at a multiple of 8 bytes.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        yield from _write_tensors(stream, names, tensor)


def _write_tensors(
    stream: BinaryIO, names: list[str], tensor: Callable[[str], npt.NDArray[np.float32]]
) -> Iterator[int]:
    written = 0
    for name in names:
        values = np.ascontiguousarray(tensor(name), dtype="<f4")
        stream.write(values.data)
        written += values.nbytes
        yield written
