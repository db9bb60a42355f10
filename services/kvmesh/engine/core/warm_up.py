"""Times a few steps at the start, so that the first prediction is no guess."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvmesh.engine.core.blocks import BlockPool, Hold
from kvmesh.engine.core.runner import Runner, SampleSpec, Slice
from kvmesh.engine.core.step_model import StepLoad, bound_layers, fit
from kvmesh.engine.core.steps import Clock
from kvmesh.v1 import worker_pb2 as wire

BUDGET_S = 4.0
"""No further step is begun after this long."""

_CONTEXTS = (0, 512)
_CHUNKS = (32, 128)
_BATCHES = (1, 8)
_ID = 7


def measure(runner: Runner, pool: BlockPool, clock: Clock, context_length: int) -> wire.StepModel:
    """Runs chunks and batches of two sizes at two contexts, and fits the model.

    The blocks hold no meaning; first steps, not counted, wake the device up.
    """
    size = runner.block_tokens
    room = min(pool.blocks * size, context_length)
    contexts = [context for context in _CONTEXTS if context + max(_CHUNKS) < room] or [0]
    chunks = [chunk for chunk in _CHUNKS if chunk + max(contexts) < room] or [max(1, room // 2)]
    tokens = max(contexts) + max(chunks) + 1
    slots = pool.allocate(pool.blocks_for(tokens), Hold.RUNNING)
    if slots is None:
        raise ValueError(f"a pool of {pool.blocks} blocks cannot hold {tokens} tokens")
    loads, times = [], []
    started = clock.now()
    try:
        _run(runner, [_slice(slots, 0, min(chunks), size)])
        for batch, load in _steps(slots, contexts, chunks, size):
            if clock.now() - started > BUDGET_S:
                break
            if load.decode_batch:
                # The first step of a shape may be kept for later ones, which takes longer.
                _run(runner, batch)
            begun = clock.now()
            _run(runner, batch)
            loads.append(load)
            times.append((clock.now() - begun) * 1000)
    finally:
        pool.drop(slots, Hold.RUNNING)
    model = fit(loads, times)
    bound_layers(model, runner.layers)
    return model


def _steps(
    slots: list[int], contexts: Sequence[int], chunks: Sequence[int], size: int
) -> list[tuple[list[Slice], StepLoad]]:
    """The steps, those first without which the fit would know least."""
    steps = []
    for context in contexts:
        for rows in _BATCHES:
            # Streams of one sequence write the same token to the same place.
            at = max(1, context)
            batch = [_slice(slots, at, 1, size) for _ in range(rows)]
            steps.append((batch, StepLoad(decode_batch=rows, decode_context=rows * (at + 1))))
        for tokens in chunks:
            load = StepLoad()
            load.add_chunk(context, tokens)
            steps.append(([_slice(slots, context, tokens, size)], load))
    return steps


def _slice(slots: list[int], start: int, tokens: int, size: int) -> Slice:
    blocks = np.array(slots[: -(-(start + tokens) // size)], dtype=np.uint32)
    spec = SampleSpec(wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0), [_ID], [], None)
    return Slice(np.full(tokens, _ID, np.uint32), start, blocks, spec)


def _run(runner: Runner, batch: list[Slice]) -> None:
    for _ in runner.forward(batch):
        pass
