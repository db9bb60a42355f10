"""Do pools apart serve more requests within their targets than the same GPUs together?

The simulator (docs/simulator.md) with the profile of a 70B model: a worker is a tensor-parallel
group of four H100, eight of them in every row, and the same arrivals come to each:

    split     4 prefill and 4 decode workers, as shipped
    strict    the same; decode workers compute no prompts, as in the papers' pools
    fitted    as strict, with the P:D ratio that serves most of this trace, as the papers choose it
    unified   8 workers for both, as shipped: chunks of prompts sized to the target between tokens
    whole     8 workers for both as the papers' baselines: whole prompts in a step, first come
              first served, at the worker with the fewest requests

A request is within its targets when its first token comes within 5x the time that an empty worker
takes for its prompt, and its mean time between tokens is at most that of its class. The knee is
the highest rate at which 90 % are. Prompts share no prefixes, as in the papers (Mooncake's own are
kept). "Tightest" is the factor on both targets at which 90 % would still be within them, at half
the knee of unified: what the papers call a tighter SLO.

    python benchmarks/slo_sweep.py [--quick] [--json FILE] [--html FILE] [--traces DIR]
        [--only conv,code,mooncake] [--seeds N]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from alternating import Figure, print_figures, print_table, write_json
from slo_sweep_plot import Curve, write_html
from trace_files import add_traces, need_traces
from trace_rows import Arrival, azure, json_lines, mooncake

from kvmesh.simulate.profiles import Profile, load_profile
from kvmesh.simulate.replay import FIFO, Cluster, Policy, TraceFile, replay

PROFILE = "h100-70b-tp4"
WORKERS = 8
SERVED = 0.9
TTFT_FACTOR = 5.0
ITL_MS = {"interactive": 50.0, "standard": 100.0}
PREEMPTION_MS = 100.0
"""Longest chunk of an engine that stops only between chunks (the simulator's)."""
CHUNK_LEAST = 16
WARM_UP = 0.2


@dataclass(frozen=True)
class Workload:
    """A trace, and what its requests are held to."""

    name: str
    title: str
    file: str
    request_class: str
    block_tokens: int

    def read(self, folder: Path, share: float) -> list[Arrival]:
        """Its requests, in the order of their arrival; `share` of them, from the start."""
        text = (folder / self.file).read_text(encoding="utf-8")
        found = azure(text) if self.file.endswith(".csv") else mooncake(text)
        return found[: round(share * len(found))]


WORKLOADS = (
    Workload("conv", "Azure conversation", "azure_conv_2023_part1.csv", "interactive", 16),
    Workload("code", "Azure code", "azure_code_2023_part1.csv", "interactive", 16),
    Workload("mooncake", "Mooncake", "mooncake_conversation_part1.jsonl", "standard", 512),
)


@dataclass(frozen=True)
class Arrangement:
    """Eight workers, and who chooses among them."""

    name: str
    cluster: Cluster
    policy: Policy


def strict(name: str, profile: Profile, prefill: int) -> Arrangement:
    """Pools of which each does its own stage only."""
    own_stage = {"local_prefill": "without-prefill-workers"}
    cluster = Cluster(profile, 0, prefill, WORKERS - prefill, own_stage)
    return Arrangement(name, cluster, Policy("cost"))


def arrangements(profile: Profile, longest: int) -> list[Arrangement]:
    """All of them. `longest`: prompt of the trace, tokens."""
    half = WORKERS // 2
    # Nothing bounds a step but the longest prompt, and nothing stops it.
    whole = {"saturating_chunk": longest, "chunk_tokens": longest, "layer_preemption": True}
    unbounded = {**profile, **whole}
    return [
        Arrangement("split", Cluster(profile, 0, half, half), Policy("cost")),
        strict("strict", profile, half),
        Arrangement("unified", Cluster(profile, WORKERS), Policy("cost")),
        Arrangement("whole", Cluster(unbounded, WORKERS), Policy("least-loaded", queue=FIFO)),
    ]  # fmt: skip


def unloaded_ms(profile: Profile, prompt: int) -> float:
    """First token of a prompt on an empty worker of mean speed, in the chunks of an engine that
    stops only between them: the simulator's own yardstick (`outcome/unloaded.rs`)."""
    a, b, c = (float(profile["step"][name]) for name in ("a_ms", "b_ms", "c_ms"))
    at, total = 0, 0.0
    while at < max(prompt, 1):
        linear = b + c * (at + 0.5)
        within = 2 * PREEMPTION_MS / (linear + (linear**2 + 2 * c * PREEMPTION_MS) ** 0.5)
        tokens = int(max(min(within, profile["saturating_chunk"]), CHUNK_LEAST))
        tokens = min(tokens, max(prompt, 1) - at)
        total += a + b * tokens + c * (tokens * at + tokens * (tokens + 1) / 2)
        at += tokens
    return total


@dataclass(frozen=True)
class Outcome:
    """What a replay brought."""

    rate: float
    """Arrivals a second."""
    over: tuple[float, ...]
    """By request: the worse of its times over its targets; infinite for one that was not served."""
    ttft_ms: tuple[float, ...]
    itl_ms: tuple[float, ...]

    @property
    def within(self) -> float:
        """Share within the targets."""
        return sum(over <= 1 for over in self.over) / len(self.over)

    @property
    def tightest(self) -> float:
        """Factor on both targets at which SERVED would still be within them."""
        return quantile(self.over, SERVED)


def quantile(values: Sequence[float], part: float) -> float:
    """The value that a part is not above."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(part * len(ordered))) - 1]


@dataclass
class Sweep:
    """One trace at any rate, in any arrangement."""

    workload: Workload
    arrivals: Sequence[Arrival]
    profile: Profile
    seeds: Sequence[int]
    _trace: TraceFile | None = None
    _unloaded: dict[int, float] = field(default_factory=dict)

    @property
    def trace(self) -> TraceFile:
        """The arrivals as the simulator takes them."""
        if self._trace is None:
            known = self.workload.request_class
            lines = json_lines(replace(one, request_class=known) for one in self.arrivals)
            source = {"format": "simple", "block_tokens": self.workload.block_tokens}
            self._trace = TraceFile(lines, source)
        return self._trace

    def run(self, arrangement: Arrangement, speed: float, seed: int) -> Outcome:
        """One replay, judged by the class of the workload."""
        run = replay(
            self.trace, arrangement.cluster, arrangement.policy,
            speed=speed, seed=seed, rows=True, warm_up=WARM_UP,
        )  # fmt: skip
        ttft, itl, over = [], [], []
        for row in run["rows"]:
            if row["first_ms"] is None or row["end_ms"] is None:
                over.append(float("inf"))
                continue
            ttft.append(row["first_ms"] - row["arrival_ms"])
            itl.append((row["end_ms"] - row["first_ms"]) / max(1, row["output"] - 1))
            over.append(
                max(
                    ttft[-1] / (TTFT_FACTOR * self.unloaded(row["prompt"])),
                    itl[-1] / ITL_MS[self.workload.request_class],
                )
            )
        rate = float(run["summary"]["arrivals_per_s"])
        return Outcome(rate, tuple(over), tuple(ttft), tuple(itl))

    def unloaded(self, prompt: int) -> float:
        """`unloaded_ms`, once for each length."""
        if prompt not in self._unloaded:
            self._unloaded[prompt] = unloaded_ms(self.profile, prompt)
        return self._unloaded[prompt]

    def within(self, arrangement: Arrangement, speed: float) -> float:
        """Share within the targets, mean over seeds."""
        return mean(self.run(arrangement, speed, seed).within for seed in self.seeds)

    def knee(self, arrangement: Arrangement, steps: int) -> float:
        """Highest replay speed at which SERVED are within their targets, by bisection."""
        low, high = 0.0, 1.0
        while self.within(arrangement, high) >= SERVED and high < 1e4:
            low, high = high, 2 * high
        for _ in range(steps):
            middle = (low + high) / 2
            if self.within(arrangement, middle) >= SERVED:
                low = middle
            else:
                high = middle
        return low

    def fitted(self, steps: int) -> Arrangement:
        """Strict pools at the ratio that serves most."""
        ratios = [strict("fitted", self.profile, prefill) for prefill in range(1, WORKERS)]
        return max(ratios, key=lambda one: self.knee(one, steps))


def measure(sweep: Sweep, points: int, steps: int) -> tuple[list[Curve], list[dict[str, Any]]]:
    """Curves of a workload, and a row for each arrangement."""
    longest = max(one.prompt for one in sweep.arrivals)
    known = arrangements(sweep.profile, longest)
    known.insert(2, sweep.fitted(steps // 2))
    knees = {one.name: sweep.knee(one, steps) for one in known}
    most = 1.4 * max(knees.values())
    curves, rows = [], []
    for one in known:
        seed = sweep.seeds[0]
        speeds = [most * (at + 1) / points for at in range(points)]
        line = []
        for speed in speeds:
            outcomes = [sweep.run(one, speed, seed) for seed in sweep.seeds]
            line.append((outcomes[0].rate, mean(outcome.within for outcome in outcomes)))
        knee = sweep.run(one, knees[one.name], seed) if knees[one.name] else None
        curves.append(Curve(one.name, line, knee.rate if knee else 0.0))
        common = sweep.run(one, knees["unified"] / 2, seed) if knees["unified"] else None
        rows.append(
            {
                "name": one.name,
                "workers": one.cluster.name,
                "knee_per_s": knee.rate if knee else 0.0,
                "ttft_p90_ms": quantile(knee.ttft_ms, 0.9) if knee else None,
                "itl_p90_ms": quantile(knee.itl_ms, 0.9) if knee else None,
                "tightest": common.tightest if common else None,
            }
        )
    return curves, rows


HEAD = (
    "", "workers", "knee, requests/s", "a GPU", "of unified", "first token p90 ms",
    "between p90 ms", "tightest targets",
)  # fmt: skip


def show(workload: Workload, rows: Sequence[Mapping[str, Any]], gpus: int) -> None:
    """The table of a workload."""
    unified = next(row["knee_per_s"] for row in rows if row["name"] == "unified")
    print_table(
        f"{workload.title}: {TTFT_FACTOR:g}x unloaded and {ITL_MS[workload.request_class]:g} ms",
        HEAD,
        [
            [
                row["name"], row["workers"], row["knee_per_s"], row["knee_per_s"] / gpus,
                row["knee_per_s"] / unified if unified else None,
                row["ttft_p90_ms"], row["itl_p90_ms"], row["tightest"],
            ]
            for row in rows
        ],
    )  # fmt: skip


def ratios(workload: Workload, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Pools apart over together."""
    by_name = {row["name"]: row for row in rows}
    figures = []
    for other in ("unified", "whole"):
        if by_name[other]["knee_per_s"]:
            more = by_name["split"]["knee_per_s"] / by_name[other]["knee_per_s"]
            figures.append(
                Figure(f"split_over_{other}_{workload.name}", more, "ratio", "higher")
            )  # fmt: skip
        tight, tighter = by_name[other]["tightest"], by_name["split"]["tightest"]
        if tight and tighter:
            name = f"split_tighter_than_{other}_{workload.name}"
            figures.append(Figure(name, tight / tighter, "ratio", "higher"))
    if by_name["whole"]["knee_per_s"]:
        more = by_name["fitted"]["knee_per_s"] / by_name["whole"]["knee_per_s"]
        figures.append(Figure(f"fitted_over_whole_{workload.name}", more, "ratio", "higher"))
    return figures


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute; no evidence")
    parser.add_argument("--json", type=Path, help="write figures and curves here")
    parser.add_argument("--html", type=Path, help="write the plot here: one page, nothing loaded")
    add_traces(parser)
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--only", type=lambda text: text.split(","), default=names)
    parser.add_argument("--seeds", type=int, default=2, help="replays of each point")
    args = parser.parse_args()
    if unknown := set(args.only) - set(names):
        parser.error(f"--only has {', '.join(sorted(unknown))}; allowed are {', '.join(names)}")
    args.share, args.points, args.steps = 1.0, 14, 8
    if args.quick:
        args.only, args.share, args.points, args.steps = ["code"], 0.2, 6, 4
        args.seeds = 1
    args.workloads = [workload for workload in WORKLOADS if workload.name in args.only]
    need_traces(args.traces, [workload.file for workload in args.workloads])
    return args


def main() -> int:
    """Runs it; the exit status."""
    args = arguments()
    began = time.monotonic()
    profile = load_profile(PROFILE)
    gpus = WORKERS * int(profile["gpus"])
    note = f"{WORKERS} workers of {profile['hardware']}, {gpus} GPUs; {profile['model']}"
    if args.quick:
        note += ". Not evidence: a quick run."
    print(note)
    figures: list[Figure] = []
    plots: list[tuple[str, list[Curve]]] = []
    tables: dict[str, Any] = {}
    for workload in args.workloads:
        arrivals = workload.read(args.traces, args.share)
        sweep = Sweep(workload, arrivals, profile, list(range(1, args.seeds + 1)))
        curves, rows = measure(sweep, args.points, args.steps)
        show(workload, rows, gpus)
        figures += ratios(workload, rows)
        plots.append((workload.title, curves))
        tables[workload.name] = {"rows": rows, "curves": [vars(curve) for curve in curves]}
    print_figures(figures)
    print(f"{time.monotonic() - began:.0f} s")
    if args.html:
        write_html(args.html, note, plots, SERVED)
    if args.json:
        write_json(args.json, figures, quick=args.quick, note=note, workloads=tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
