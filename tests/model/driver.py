"""The smallest thing that drives a Runner: blocks for each sequence, chunks, batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

import kvmesh.engine.torch.runner as torch_runner
from kvmesh._router import KvPool
from kvmesh.engine.core.runner import Sampled, SampleSpec, Slice
from kvmesh.v1 import worker_pb2 as wire

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
"""Where these models compute, as torch names it (`make test-cuda`)."""

GREEDY = wire.ResolvedSampling(repetition_penalty=1, top_p=1)


def finish(generator):
    """Runs a forward pass to its end without pauses."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


class Stream:
    """A sequence: its ids, its blocks, how far it is computed."""

    def __init__(self, prompt: Sequence[int], blocks, sampling=GREEDY, **spec) -> None:
        self.prompt = [int(token) for token in prompt]
        self.output: list[int] = []
        self.blocks = blocks
        self.done = 0
        self.sampling = sampling
        self.spec = {"logprobs": None} | spec

    def next_slice(self, chunk: int) -> Slice:
        ids = (self.prompt + self.output)[self.done : self.done + chunk]
        last = self.done + len(ids) == len(self.prompt) + len(self.output)
        sample = None
        if last:
            sample = SampleSpec(self.sampling, self.prompt, list(self.output), **self.spec)
        piece = Slice(np.array(ids, dtype=np.uint32), self.done, self.blocks, sample)
        self.done += len(ids)
        return piece

    def take(self, sampled: Sampled | None) -> None:
        if sampled is not None:
            self.output.append(sampled.token_id)


class Driver:
    def __init__(self, runner, blocks: int, pool=None) -> None:
        self.runner = runner
        self.pool = pool or KvPool(blocks, runner.block_bytes)
        runner.bind(self.pool)
        self.free = np.random.default_rng(5).permutation(blocks).astype(np.uint32)

    def stream(self, prompt, tokens: int = 1, **more) -> Stream:
        """A stream with room for `tokens` more; blocks scattered over the pool, used anew."""
        count = -(-(len(prompt) + tokens) // self.runner.block_tokens)
        blocks, self.free = self.free[:count].copy(), np.roll(self.free, -count)
        self.pool.raise_versions(blocks.tolist())
        return Stream(prompt, blocks, **more)

    def step(self, streams: Sequence[Stream], chunk: int) -> None:
        drawn = finish(self.runner.forward([stream.next_slice(chunk) for stream in streams]))
        for stream, sampled in zip(streams, drawn, strict=True):
            stream.take(sampled)

    def generate(self, streams: Sequence[Stream], tokens: int, chunk: int) -> list[list[int]]:
        """Each step: one chunk or one token of every stream that is not done."""
        while running := [stream for stream in streams if len(stream.output) < tokens]:
            self.step(running, chunk)
        return [stream.output for stream in streams]


@contextmanager
def logits_of(runner_module=torch_runner) -> Iterator[list[torch.Tensor]]:
    """Collects the logits that a runner draws from."""
    seen: list[torch.Tensor] = []
    draw = runner_module.draw

    def note(logits, specs):
        seen.append(logits.to("cpu", copy=True))
        return draw(logits, specs)

    runner_module.draw = note
    try:
        yield seen
    finally:
        runner_module.draw = draw
