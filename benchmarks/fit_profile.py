"""What do steps of the torch engine take on this machine, as a profile for `kvmesh simulate`?

Times steps of many sizes (chunks at several contexts, batches of streams, both in one step), fits
the step model on every other one, and prints its error on those that it has not seen.

    python benchmarks/fit_profile.py [--quick] [--json FILE] [--out PROFILE.toml] [--threads N]
        [--model NAME] [--device DEVICE] [--dtype DTYPE]

The figures are the median and the 95th percentile of the relative error on unseen steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from alternating import Figure, print_table, write_json

from kvmesh._router import KvPool
from kvmesh.engine.core.runner import Runner, SampleSpec, Slice
from kvmesh.engine.core.step_model import StepLoad, fit, predict_ms
from kvmesh.engine.torch import TorchSettings, build
from kvmesh.engine.torch.build import DType
from kvmesh.simulate.profiles import load_profile
from kvmesh.v1 import worker_pb2 as wire

POOL_BLOCKS = 512
CONTEXTS = (0, 128, 512, 1024, 2048)
CHUNKS = (16, 32, 64, 128, 256)
BATCHES = (1, 2, 4, 8, 16)
TOKEN = 7
"""The same everywhere: what a step computes is not looked at."""


def slice_of(start: int, tokens: int, size: int) -> Slice:
    """Tokens after `start` others, in the first blocks of the pool."""
    blocks = np.arange(-(-(start + tokens) // size), dtype=np.uint32)
    spec = SampleSpec(wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0), [TOKEN], [], None)
    return Slice(np.full(tokens, TOKEN, np.uint32), start, blocks, spec)


def steps(size: int, count: int, seed: int) -> list[tuple[list[Slice], StepLoad]]:
    """Steps of all sizes, in a seeded order."""
    seeded = random.Random(seed)
    made = []
    for _ in range(count):
        batch, load = [], StepLoad()
        kind = seeded.choice(("prompt", "streams", "both"))
        if kind != "streams":
            start, tokens = seeded.choice(CONTEXTS), seeded.choice(CHUNKS)
            batch.append(slice_of(start, tokens, size))
            load.add_chunk(start, tokens)
        if kind != "prompt":
            for _ in range(seeded.choice(BATCHES)):
                at = max(1, seeded.choice(CONTEXTS))
                batch.append(slice_of(at, 1, size))
                load.decode_batch += 1
                load.decode_context += at + 1
        made.append((batch, load))
    return made


def timed_ms(runner: Runner, batch: list[Slice]) -> float:
    began = time.perf_counter()
    for _ in runner.forward(batch):
        pass
    return (time.perf_counter() - began) * 1e3


def hardware(args: argparse.Namespace) -> str:
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name(args.device)
    return "one x86 core" if args.threads == 1 else f"{args.threads} x86 cores"


def profile_text(model: wire.StepModel, args: argparse.Namespace, error: str) -> str:
    """The shipped profile with the fitted steps."""
    base = load_profile("cpu-smollm2")
    lines = [f'name = "{args.out.stem}"', f'hardware = "{hardware(args)}"']
    lines.append(f'model = "{base["model"]}"')
    for key in ("gpus", "kv_bytes_per_token", "pool_tokens", "max_batch", "context_length"):
        lines.append(f"{key} = {base[key]}")
    lines += [
        f"saturating_chunk = {model.saturating_chunk}",
        "layer_preemption = true",
        "",
        "[step]",
    ]
    for name in ("a_ms", "b_ms", "c_ms", "d_ms", "e_ms"):
        lines.append(f"{name} = {getattr(model, name):.6g}")
    lines += ["", "[transfer]"]
    lines += [f"{key} = {value}" for key, value in base["transfer"].items()]
    lines += ["", "[sources]", f'step = "benchmarks/fit_profile.py: {error}"']
    lines += [f'{key} = "{text}"' for key, text in base["sources"].items() if key != "step"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute; no evidence")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="write a profile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="as torch names it (default cpu)")
    parser.add_argument("--dtype", choices=get_args(DType), default="float32")
    args = parser.parse_args()
    settings = TorchSettings(args.model, "", args.device, args.dtype, threads=args.threads)
    runner = build(settings).runner
    pool = KvPool(POOL_BLOCKS, runner.block_bytes)
    runner.bind(pool)
    all_steps = steps(runner.block_tokens, 16 if args.quick else 120, 1)
    timed_ms(runner, all_steps[0][0])
    times = [timed_ms(runner, batch) for batch, _ in all_steps]
    loads = [load for _, load in all_steps]
    model = fit(loads[::2], times[::2])
    errors = sorted(
        abs(predict_ms(model, load) / ms - 1)
        for load, ms in zip(loads[1::2], times[1::2], strict=True)
    )
    median, p95 = statistics.median(errors), errors[int(0.95 * (len(errors) - 1))]
    rows = [
        (name, f"{getattr(model, name):.4g}") for name in ("a_ms", "b_ms", "c_ms", "d_ms", "e_ms")
    ]
    print_table("fitted step model", ("coefficient", "ms"), rows)
    error = f"{len(loads)} steps, on unseen ones median error {median:.1%}, 95 % within {p95:.1%}"
    print(error + ("; quick: no evidence" if args.quick else ""))
    if args.out:
        args.out.write_text(profile_text(model, args, error), encoding="utf-8")
    if args.json:
        figures = [
            Figure("fit_error_median", median, "ratio", "lower"),
            Figure("fit_error_p95", p95, "ratio", "lower"),
        ]
        write_json(args.json, figures, quick=args.quick)
    runner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
