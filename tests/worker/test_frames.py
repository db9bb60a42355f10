"""A step becomes frames of at most 64 KiB, in order and without loss."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.contract import RouterStep, TokenColumns
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.cache_log import FRAME_BYTES
from kvmesh.worker.frames import step_frames


def generation(number: int) -> bytes:
    return number.to_bytes(16, "big")


def rows_of(frames: list[bytes]) -> list[tuple]:
    rows = []
    for frame in frames:
        tokens = wire.WorkerFrame.FromString(frame).step.tokens
        first = 0
        logprobs = {row.row: len(row.tokens) for row in tokens.logprobs}
        for i, count in enumerate(tokens.counts):
            rows.append(
                (
                    tokens.generations[16 * i : 16 * i + 16],
                    tokens.owners[i],
                    tokens.attempts[i],
                    tokens.first_indices[i],
                    tuple(tokens.ids[first : first + count]),
                    logprobs.get(i, 0),
                )
            )
            first += count
        assert first == len(tokens.ids)
    return rows


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 3_000), min_size=1, max_size=40),
    with_logprobs=st.sets(st.integers(0, 39)),
    openings=st.integers(0, 300),
    ends=st.integers(0, 300),
)
def test_nothing_is_lost_or_reordered(counts, with_logprobs, openings, ends) -> None:
    ids = list(range(sum(counts)))
    rows = range(len(counts))
    output = RouterStep(
        openings=[
            wire.Opening(generation=generation(i), reserved=wire.Reserved(tokens_reserved=i))
            for i in range(openings)
        ],
        tokens=TokenColumns(
            generations=b"".join(generation(i) for i in rows),
            owners=[1] * len(counts),
            attempts=[i + 1 for i in rows],
            first_indices=[7 * i for i in rows],
            counts=counts,
            ids=ids,
            logprobs=[
                wire.RowLogprobs(
                    row=i, tokens=[inference.TokenLogprobs(logprob=-1.0)] * min(counts[i], 50)
                )
                for i in rows
                if i in with_logprobs
            ],
        ),
        ends=[
            wire.StageEnd(generation=generation(i), cancelled=wire.Cancelled()) for i in range(ends)
        ],
    )
    sample = wire.StepSample(decode_batch=len(counts))
    frames = step_frames(9, output, sample, wire.Load(step=9))

    first, expected = 0, []
    for i, count in enumerate(counts):
        held = min(count, 50) if i in with_logprobs else 0
        expected.append((generation(i), 1, i + 1, 7 * i, tuple(ids[first : first + count]), held))
        first += count
    assert rows_of(frames) == expected

    steps = [wire.WorkerFrame.FromString(frame).step for frame in frames]
    assert [o.reserved.tokens_reserved for s in steps for o in s.openings] == list(range(openings))
    assert [e.generation for s in steps for e in s.ends] == [generation(i) for i in range(ends)]
    kinds = [
        kind
        for s in steps
        for kind, there in (("o", s.openings), ("t", s.tokens.counts), ("e", s.ends))
        if there
    ]
    assert kinds == sorted(kinds, key="ote".index)
    assert [s.last for s in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].sample == sample
    assert steps[-1].load.step == 9
    assert all(not s.HasField("load") for s in steps[:-1])


def test_a_long_step_is_cut_and_a_short_one_is_not() -> None:
    def frames(rows: int) -> list[bytes]:
        columns = TokenColumns(
            generations=b"".join(generation(i) for i in range(rows)),
            owners=[1] * rows,
            attempts=[1] * rows,
            first_indices=[0] * rows,
            counts=[1] * rows,
            ids=[70_000] * rows,
        )
        return step_frames(1, RouterStep(tokens=columns), None, None)

    assert len(frames(64)) == 1
    long = frames(8_000)
    assert len(long) > 1
    assert max(map(len, long)) <= FRAME_BYTES
    assert len(rows_of(long)) == 8_000
