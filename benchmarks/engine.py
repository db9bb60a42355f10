"""What do the engine's kernels cost or save beside transformers?

The same weights, the same threads, float32, greedy, in one process, blocks in turn.

    python benchmarks/engine.py [--quick] [--json FILE] [--threads N] [--model NAME]
        [--device DEVICE]

Prefill: one prompt, tokens/s to its first token; ours in chunks of 512 over paged KV, transformers'
forward as its `generate` calls it (SDPA attention, logits of the last position only). Decode: eight
prompts of different lengths; ours one batch of slices a step, transformers' `generate` on one
padded batch, timed from its first new token to its last.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import alternating
import numpy as np
import torch
from alternating import (
    Blocks,
    Figure,
    alternate,
    is_evidence,
    print_figures,
    print_table,
    write_json,
)

from kvmesh import models
from kvmesh._router import KvPool
from kvmesh.engine.core.runner import Runner, Sampled, SampleSpec, Slice
from kvmesh.engine.torch import TorchSettings, build
from kvmesh.v1 import worker_pb2 as wire

T = TypeVar("T")
CHUNK = 512
STREAMS = 8
GREEDY = wire.ResolvedSampling()
POOL_BLOCKS = 640
# Different lengths, mean 500: a padded batch pays for the longest.
DECODE_LENGTHS = (290, 350, 410, 470, 530, 590, 650, 710)


def to_end(generator: Generator[None, None, T]) -> T:
    """Runs a forward pass without pauses."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


class Stream:
    """One stream of ours: its ids and its blocks."""

    def __init__(self, prompt: np.ndarray, blocks: np.ndarray) -> None:
        self.prompt = prompt
        self.blocks = blocks
        self.output: list[int] = []

    def prefill(self, runner: Runner) -> None:
        self.output.clear()
        for start in range(0, len(self.prompt), CHUNK):
            ids = self.prompt[start : start + CHUNK]
            last = start + CHUNK >= len(self.prompt)
            spec = SampleSpec(GREEDY, (), (), None) if last else None
            (sampled,) = to_end(runner.forward([Slice(ids, start, self.blocks, spec)]))
            if sampled is not None:
                self.output.append(sampled.token_id)

    def next_slice(self) -> Slice:
        start = len(self.prompt) + len(self.output) - 1
        ids = np.array(self.output[-1:], dtype=np.uint32)
        return Slice(ids, start, self.blocks, SampleSpec(GREEDY, (), self.output, None))


def decode_step(runner: Runner, sequences: Sequence[Stream]) -> None:
    drawn: list[Sampled | None] = to_end(runner.forward([s.next_slice() for s in sequences]))
    for sequence, sampled in zip(sequences, drawn, strict=True):
        assert sampled is not None
        sequence.output.append(sampled.token_id)


def prompts(vocabulary: int, lengths: Sequence[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(20, vocabulary - 20, length).astype(np.uint32) for length in lengths]


class Ours:
    def __init__(self, model: str, threads: int, device: str) -> None:
        built = build(TorchSettings(model, threads=threads, device=device, dtype="float32"))
        self.runner = built.runner
        self.folder = built.folder
        self.vocabulary = built.record.vocabulary_size
        # Every page exists before anything is timed.
        self.pool = KvPool(POOL_BLOCKS, self.runner.block_bytes, populate=True)
        self.runner.bind(self.pool)
        self.sequences: list[Stream] = []

    def prefill(self, prompt: np.ndarray) -> float:
        blocks = np.arange(-(-len(prompt) // 16), dtype=np.uint32)
        sequence = Stream(prompt, blocks)
        begin = time.perf_counter()
        sequence.prefill(self.runner)
        return len(prompt) / (time.perf_counter() - begin)

    def start_streams(self, given: Sequence[np.ndarray], tokens: int) -> None:
        """Prefills the streams; their blocks are scattered over the pool."""
        rng = np.random.default_rng(3)
        free = rng.permutation(POOL_BLOCKS).astype(np.uint32)
        for prompt in given:
            count = -(-(len(prompt) + tokens + 1) // 16)
            blocks, free = free[:count].copy(), free[count:]
            self.sequences.append(Stream(prompt, blocks))
            self.sequences[-1].prefill(self.runner)

    def decode(self, tokens: int) -> float:
        for sequence in self.sequences:
            del sequence.output[1:]
        begin = time.perf_counter()
        for _ in range(tokens):
            decode_step(self.runner, self.sequences)
        return STREAMS * tokens / (time.perf_counter() - begin)


class Transformers:
    def __init__(self, folder: Path, device: str) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    def prefill(self, prompt: np.ndarray) -> float:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(self.device)
        begin = time.perf_counter()
        with torch.inference_mode():
            self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
        return len(prompt) / (time.perf_counter() - begin)

    def decode(self, given: Sequence[np.ndarray], tokens: int) -> float:
        longest = max(len(prompt) for prompt in given)
        ids = torch.zeros(len(given), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(given):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, longest - len(prompt) :] = 1
        moments: list[float] = []

        def note(_ids: torch.Tensor, _scores: Any) -> torch.Tensor:
            """Called after each token of the batch; stops nothing."""
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())
            return torch.zeros(len(given), dtype=torch.bool, device=self.device)

        with torch.inference_mode():
            self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                do_sample=False,
                min_new_tokens=tokens + 1,
                max_new_tokens=tokens + 1,
                stopping_criteria=[note],
            )
        return len(given) * tokens / (moments[-1] - moments[0])


def ratio(blocks: Blocks[float], ours: str, theirs: str) -> tuple[float, float, float]:
    """Medians of both and of the ratios of pairs of one round."""
    pairs = list(zip(blocks.results[ours], blocks.results[theirs], strict=True))
    return (
        blocks.median(ours, float),
        blocks.median(theirs, float),
        float(np.median([a / b for a, b in pairs])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write figures here")
    parser.add_argument("--quick", action="store_true", help="under a minute; not evidence")
    parser.add_argument("--threads", type=int, default=1, help="threads of both (default 1)")
    parser.add_argument("--model", default="smollm2-135m", help="model name or folder")
    parser.add_argument("--device", default="cpu", help="of both, as torch names it (default cpu)")
    parser.add_argument("--rounds", type=int, help="rounds of blocks (default 7; quick 2)")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds = arguments.rounds or (2 if quick else 7)
    tokens = 12 if quick else 32
    lengths = (512,) if quick else (512, 2048)

    if quick:
        # Under a minute whatever others do; then it is no evidence.
        alternating.MAX_REPEATS = 0
    models.pull(arguments.model)
    ours = Ours(arguments.model, arguments.threads, arguments.device)
    theirs = Transformers(ours.folder, arguments.device)
    figures: list[Figure] = []
    rows: list[list[object]] = []
    busy = 0
    for length in lengths:
        (prompt,) = prompts(ours.vocabulary, (length,))
        ours.prefill(prompt[:64])
        theirs.prefill(prompt[:64])
        cases = {
            "kvmesh": lambda prompt=prompt: ours.prefill(prompt),
            "transformers": lambda prompt=prompt: theirs.prefill(prompt),
        }
        blocks = alternate(cases, rounds, lambda: ())
        busy += blocks.kept_busy
        mine, other, over = ratio(blocks, "kvmesh", "transformers")
        rows.append([f"prefill {length}", mine, other, over, blocks.repeated, blocks.kept_busy])
        suffix = "" if length == lengths[-1] else f"_{length}"
        figures.append(Figure(f"prefill_over_transformers{suffix}", over, "ratio", "higher"))
        figures.append(Figure(f"prefill_tokens_per_s_{length}", mine, "tokens/s", "higher"))

    scale = 4 if quick else 1
    given = prompts(ours.vocabulary, [length // scale for length in DECODE_LENGTHS])
    ours.start_streams(given, tokens)
    gc.collect()
    blocks = alternate(
        {
            "kvmesh": lambda: ours.decode(tokens),
            "transformers": lambda: theirs.decode(given, tokens),
        },
        max(2, rounds // 2) if not quick else 1,
        lambda: (),
    )
    busy += blocks.kept_busy
    mine, other, over = ratio(blocks, "kvmesh", "transformers")
    rows.append(["decode, 8 streams", mine, other, over, blocks.repeated, blocks.kept_busy])
    figures.append(Figure("decode8_over_transformers", over, "ratio", "higher"))
    figures.append(Figure("decode8_tokens_per_s", mine, "tokens/s", "higher"))

    huge, _, _ = ours.pool.huge_use()
    print(f"KV pool: {huge >> 20} of {ours.pool.nbytes >> 20} MiB in huge pages")
    where = arguments.device if arguments.device != "cpu" else f"{arguments.threads} thread(s)"
    title = f"{arguments.model}, float32, {where}, {rounds} rounds"
    head = ["", "kvmesh tok/s", "transformers tok/s", "ratio", "repeated", "kept busy"]
    print_table(title + (" (quick: not evidence)" if quick else ""), head, rows)
    print_figures(figures)
    evidence = is_evidence(quick=quick, busy=busy > 0)
    if arguments.json:
        about = {"quick": quick, "kept_busy": busy, "torch": torch.__version__}
        write_json(arguments.json, figures, evidence=evidence, **about)


if __name__ == "__main__":
    main()
