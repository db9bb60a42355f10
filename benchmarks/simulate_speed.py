"""How fast does the simulator run, and in how much memory?

Two questions of scale, each in a process of its own on one core: the first half of the Mooncake
conversation trace on 16 workers at twice its speed, and a million made-up requests on 1,000
workers. Wall time, CPU time and the process's largest resident set.

    python benchmarks/simulate_speed.py [--quick] [--json FILE] [--traces DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alternating import Figure, print_table, write_json
from trace_files import add_traces, need_traces

from kvmesh.simulate.profiles import load_profile
from kvmesh.simulate.replay import Cluster, Policy, Run, TraceFile, replay

PROFILE = "h100-70b-tp4"
MOONCAKE = "mooncake_conversation_part1.jsonl"
WORKERS, REQUESTS = 1_000, 1_000_000
QUICK_WORKERS, QUICK_REQUESTS = 100, 20_000
PER_WORKER_SECOND = 0.6
"""Arrivals a second and worker: a good half of what a worker can do."""


def mooncake(traces: Path) -> Run:
    trace = TraceFile.read(traces / MOONCAKE)
    return replay(trace, Cluster(load_profile(PROFILE), both=16), Policy("cost"), speed=2.0)


def made_up(workers: int, requests: int) -> Run:
    trace = TraceFile.synthetic(requests=requests, per_second=workers * PER_WORKER_SECOND)
    cluster = Cluster(load_profile(PROFILE), both=workers)
    return replay(trace, cluster, Policy("cost"))


def one(case: str, traces: Path, workers: int, requests: int) -> None:
    """Runs a case in this process and prints what it took."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    began = time.perf_counter()
    run = mooncake(traces) if case == "mooncake" else made_up(workers, requests)
    used = resource.getrusage(resource.RUSAGE_SELF)
    took = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "gib": used.ru_maxrss / 2**20,
        "requests": run["summary"]["requests"],
    }
    print(json.dumps(took))


def apart(case: str, args: argparse.Namespace) -> Mapping[str, Any]:
    """The case in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--case", case, "--traces", str(args.traces)]
    command += ["--workers", str(args.workers), "--requests", str(args.requests)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    took: Mapping[str, Any] = json.loads(done.stdout)
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; no evidence")
    parser.add_argument("--json", type=Path, help="write the figures there")
    add_traces(parser)
    parser.add_argument("--workers", type=int, help="of the made-up case")
    parser.add_argument("--requests", type=int, help="of the made-up case")
    parser.add_argument("--case", choices=("mooncake", "made-up"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.workers = args.workers or (QUICK_WORKERS if args.quick else WORKERS)
    args.requests = args.requests or (QUICK_REQUESTS if args.quick else REQUESTS)
    if args.case:
        one(args.case, args.traces, args.workers, args.requests)
        return 0
    need_traces(args.traces, [MOONCAKE])

    names = {
        "mooncake": "Mooncake half, 16 workers, twice its speed",
        "made-up": f"made-up, {args.workers:,} workers",
    }
    took = {case: apart(case, args) for case in names}
    print_table(
        "the simulator on one core" + (" (quick: no evidence)" if args.quick else ""),
        ["", "requests", "seconds", "CPU s", "requests/s", "GiB"],
        [
            [
                names[case],
                f"{row['requests']:,}",
                f"{row['seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}",
                f"{row['requests'] / row['seconds']:,.0f}",
                f"{row['gib']:.2f}",
            ]
            for case, row in took.items()
        ],
    )
    figures = [
        Figure("mooncake_half_seconds", took["mooncake"]["seconds"], "s", "lower"),
        Figure("made_up_seconds", took["made-up"]["seconds"], "s", "lower"),
        Figure("made_up_gib", took["made-up"]["gib"], "GiB", "lower"),
    ]
    if args.json:
        write_json(args.json, figures, quick=args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
