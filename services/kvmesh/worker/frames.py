"""From an engine's step to frames of at most 64 KiB."""

from __future__ import annotations

from collections.abc import Iterator

from kvmesh.engine.contract import RouterStep, TokenColumns
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.cache_log import FRAME_BYTES

# Bytes that a row, a token id and a token with log-probabilities take at most,
# rounded up: below the sum of these no frame needs to be measured.
_ROW, _ID, _LOGPROB, _MESSAGE = 48, 6, 300, 256


def step_frames(
    step: int,
    output: RouterStep,
    sample: wire.StepSample | None,
    load: wire.Load | None,
) -> list[bytes]:
    """Encodes what a step brought for one router.

    Mostly one frame. A longer step is cut; openings, tokens and ends keep
    their order over the cuts, and the last frame carries sample and load.
    """
    if _estimate(output) < FRAME_BYTES:
        return [_encode(step, output, True, sample, load)]
    *parts, last = _cut(output)
    frames = [_encode(step, part, False, None, None) for part in parts]
    frames.append(_encode(step, last, True, sample, load))
    return frames


def _encode(
    step: int,
    output: RouterStep,
    last: bool,
    sample: wire.StepSample | None,
    load: wire.Load | None,
) -> bytes:
    columns = output.tokens
    rows = None
    if columns is not None:
        rows = wire.TokenRows(
            generations=columns.generations,
            owners=columns.owners,
            attempts=columns.attempts,
            first_indices=columns.first_indices,
            counts=columns.counts,
            ids=columns.ids,
            logprobs=columns.logprobs,
        )
    return wire.WorkerFrame(
        step=wire.StepOutput(
            step=step,
            last=last,
            openings=output.openings,
            tokens=rows,
            ends=output.ends,
            sample=sample,
            load=load,
        )
    ).SerializeToString()


def _estimate(output: RouterStep) -> int:
    size = _MESSAGE * (len(output.openings) + len(output.ends) + 1)
    # Traces and opaque hand-offs make ends long; both are rare.
    for end in output.ends:
        if end.timings.trace or end.HasField("handed_off"):
            size += end.ByteSize()
    columns = output.tokens
    if columns is not None:
        size += _ROW * len(columns.counts) + _ID * len(columns.ids)
        for row in columns.logprobs:
            size += _LOGPROB * len(row.tokens)
    return size


def _cut(output: RouterStep) -> Iterator[RouterStep]:
    """Pieces whose estimates fit, in wire order."""
    for opening in output.openings:
        yield RouterStep(openings=[opening])
    columns = output.tokens
    if columns is not None:
        yield from (RouterStep(tokens=part) for part in _cut_columns(columns))
    for end in output.ends:
        yield RouterStep(ends=[end])


def _cut_columns(columns: TokenColumns) -> Iterator[TokenColumns]:
    logprobs = {row.row: row for row in columns.logprobs}
    first_id = 0
    begin, begin_id, size = 0, 0, 0
    for row, count in enumerate(columns.counts):
        row_size = _ROW + _ID * count
        if row in logprobs:
            row_size += _LOGPROB * len(logprobs[row].tokens)
        if row > begin and size + row_size > FRAME_BYTES:
            yield _slice(columns, begin, row, begin_id, first_id, logprobs)
            begin, begin_id, size = row, first_id, 0
        size += row_size
        first_id += count
    yield _slice(columns, begin, len(columns.counts), begin_id, first_id, logprobs)


def _slice(
    columns: TokenColumns,
    begin: int,
    end: int,
    begin_id: int,
    end_id: int,
    logprobs: dict[int, wire.RowLogprobs],
) -> TokenColumns:
    return TokenColumns(
        generations=columns.generations[16 * begin : 16 * end],
        owners=columns.owners[begin:end],
        attempts=columns.attempts[begin:end],
        first_indices=columns.first_indices[begin:end],
        counts=columns.counts[begin:end],
        ids=columns.ids[begin_id:end_id],
        logprobs=[
            wire.RowLogprobs(row=row - begin, tokens=logprobs[row].tokens)
            for row in range(begin, end)
            if row in logprobs
        ],
    )
