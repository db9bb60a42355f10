"""What does a decision cost?

A decision is all that a router does between a request's place in line and a booked plan: look-up in
the index, what changed since the last decision, choice by added delay, bookings. Before it every
request is admitted, once: a look-up of its own, whether any worker can take it, and what it would
wait for, without its key and with it; that is a column, and not part of the decision. The prompt
has 5,000 tokens, an eighth of the workers hold prefixes of it, every worker has load, and between
two decisions one of them reports. Hashing of the prompt is shown apart, and so are what a Python
function that scores the plans adds, and decisions a second where 64 requests wait and are tried
anew as workers report (router_rs/scheduler/examples/dispatch_speed.rs). Where a function scores
the plans, every pair of the best of each side is counted: "scored" is that choice, without the
function. "Own" is the least of three times in which the same decision was made: whatever else
interrupts the core is in the others.

    python benchmarks/decision.py [--quick] [--json FILE]

Measured by the scheduler's own example (router_rs/scheduler/examples/decision_speed.rs), on one
core. A figure is the median over blocks of the 99th percentile, of the slowest of three clusters:
prefill and decode workers in equal parts, workers that do both, and a mix. Blocks during which the
machine was busy with something else are repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
from alternating import Figure, alternate, print_figures, print_table, write_json

from kvmesh._router import measure_scorer

ROOT = Path(__file__).resolve().parents[1]
PLANS = 72
"""Plans of a decision as shipped: eight by eight pairs, and eight of one worker."""

Case = dict[str, float | str]


def build(example: str) -> Path:
    """Builds a measuring program."""
    subprocess.run(
        ["cargo", "build", "--release", "-p", "kvmesh-scheduler", "--example", example],
        cwd=ROOT,
        check=True,
        env={key: value for key, value in os.environ.items() if key != "CARGO_TARGET_DIR"},
    )
    return ROOT / "target/release/examples" / example


def measure(program: Path, decisions: int) -> list[Case]:
    """One block: a row a cluster."""
    done = subprocess.run(
        [program, str(decisions)], capture_output=True, text=True, check=True, timeout=600
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def weighted(columns: dict[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """A scorer as people write them: first token, and a little of the rest."""
    scores: npt.NDArray[np.float64] = columns["ttft"] + 0.2 * columns["others_stretch"]
    return scores


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; no evidence")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    program, waiting = build("decision_speed"), build("dispatch_speed")
    rounds, decisions = (3, 3_000) if args.quick else (15, 20_000)
    measured = {
        "decision": lambda: measure(program, decisions),
        "waiting": lambda: measure(waiting, decisions),
    }
    blocks = alternate(measured, rounds, lambda: ())
    runs = blocks.results["decision"]

    def median(row: int, of: str) -> float:
        return statistics.median(float(run[row][of]) for run in runs)

    shown = (
        "hash_us", "p50_us", "p99_us", "own_p50_us", "own_p99_us", "choice_p50_us", "choice_p99_us",
        "admission_p50_us", "admission_p99_us", "scored_p50_us", "scored_p99_us",
    )  # fmt: skip
    rows = [
        (case["workers"], case["roles"], *(median(number, of) for of in shown))
        for number, case in enumerate(runs[0])
    ]
    print_table(
        f"A decision for a prompt of 5,000 tokens, microseconds; {rounds} blocks of "
        f"{decisions:,} each, {blocks.repeated} repeated, {blocks.kept_busy} kept busy",
        (
            "workers",
            "roles",
            "hash",
            "p50",
            "p99",
            "own p50",
            "own p99",
            "choice p50",
            "choice p99",
            "admission p50",
            "admission p99",
            "scored p50",
            "scored p99",
        ),
        rows,
    )
    shown = ("waiting", "decisions_per_s", "us_per_report")
    queues = [
        (
            case["workers"],
            *(
                statistics.median(float(run[number][of]) for run in blocks.results["waiting"])
                for of in shown
            ),
        )
        for number, case in enumerate(blocks.results["waiting"][0])
    ]
    print_table(
        "What waits in the router, tried anew as workers report; a report's share in microseconds",
        ("workers", "waiting", "decisions/s", "a report"),
        queues,
    )
    calls = sorted(measure_scorer(weighted, PLANS, 2_000 if args.quick else 20_000))
    scorer_us = [calls[int(share * (len(calls) - 1))] * 1e6 for share in (0.5, 0.99)]
    print_table(
        f"What a Python scorer adds, microseconds; {PLANS} plans", ("p50", "p99"), [scorer_us]
    )
    if args.quick:
        print("\n--quick: too short to be evidence")
    worst = {workers: max(row[4] for row in rows if row[0] == workers) for workers in (64, 1_024)}
    scored = {workers: max(row[12] for row in rows if row[0] == workers) for workers in (64, 1_024)}
    entry = {workers: max(row[10] for row in rows if row[0] == workers) for workers in (64, 1_024)}
    own = {workers: max(row[6] for row in rows if row[0] == workers) for workers in (64, 1_024)}
    figures = [
        Figure("own_p99_us_64_workers", own[64], "us", "lower"),
        Figure("own_p99_us_1024_workers", own[1_024], "us", "lower"),
        Figure("admission_p99_us_64_workers", entry[64], "us", "lower"),
        Figure("admission_p99_us_1024_workers", entry[1_024], "us", "lower"),
        Figure("p99_us_64_workers", worst[64], "us", "lower"),
        Figure("p99_us_1024_workers", worst[1_024], "us", "lower"),
        Figure("decisions_per_s_64_waiting_64_workers", queues[0][2], "1/s", "higher"),
        Figure("decisions_per_s_64_waiting_1024_workers", queues[1][2], "1/s", "higher"),
        Figure("scored_p99_us_64_workers", scored[64], "us", "lower"),
        Figure("scored_p99_us_1024_workers", scored[1_024], "us", "lower"),
        Figure("hash_us_5000_tokens", rows[0][2], "us", "lower"),
        Figure("python_scorer_p50_us", scorer_us[0], "us", "lower"),
    ]
    print_figures(figures)
    if args.json:
        write_json(args.json, figures, rows=rows, repeated=blocks.repeated, quick=args.quick)


if __name__ == "__main__":
    main()
