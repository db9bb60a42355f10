"""How much more of a mixed load does the router serve within its targets than fixed policies do?

The Azure traces of code (long prompts, short answers; class standard) and of conversations (class
interactive) are replayed together, with arrivals scaled to a rate, live: etcd, a router, sim
workers with the step times of an 8B model on an H100 at half its speed, and the compiled load
client of the testkit. Each policy has a cluster of its own and gets the same requests (900 from
where both traces flow, four in ten of them code) at one rate after the other, from that on which
the simulator predicts for it: up while enough interactive ones are within their targets (first
token within 1 s, 50 ms between tokens in the mean), or down until they are. The baselines are the
router's fixed policies (`--policy`), each twice: in our queue, with its order (what placement alone
is worth), and first come, first served, sent on at once (`:arrival`; what routers with that policy
do, so this is the whole).

The traces have no prefixes; made-up ones are as in the simulator (docs/simulator.md), other ones
at each rate. The first fifth of each run warms up and does not count. A run is void, and made
again, where the client used over half a core or sent a request over 5 ms late.

    python benchmarks/mixed_trace.py [--quick] [--json FILE] [--traces DIR] [--cluster 2P2D|4]
        [--policies cost,round-robin,round-robin:arrival,…] [--rates 14,16,…] [--requests N]
        [--no-prefixes] [--simulated]

The figures compare the rate up to which 90 % of the interactive requests are within their targets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alternating import (
    Figure,
    machine_busy_seconds,
    print_figures,
    print_table,
    say,
    write_json,
)
from mixed_simulated import simulate, workers_of
from routing_quality_cells import FIXED
from streams import build
from trace_files import add_traces, need_traces
from trace_rows import Arrival, at_rate, azure, json_lines, with_prefixes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

from cluster import Cluster

OURS = "cost"
BASELINES = (*FIXED, "overlap-load")
FIRST_COME = ":arrival"
"""Ends the name of a baseline that is first come, first served."""
TRACES = {"interactive": "azure_conv_2023_part1.csv", "standard": "azure_code_2023_part1.csv"}
"""Files by the class that their requests get."""
BLOCK_TOKENS = 64
SPEED = 0.5
PROFILE = f"profile=h100-8b,speed={SPEED}"
POOL_TOKENS = 200_000
SERVED = 0.9
STOP_BELOW = 0.8
"""Share of the interactive requests under which no higher rate is tried of those given."""
CPU_LIMIT = 0.5
LATE_LIMIT_MS = 5.0
MOST_REPEATS = 2
GRACE_S = 30.0
LEAST_RATE, RATE_STEP, MOST_RATE = 1.0, 1.12, 60.0
SKIPPED = 1_650
"""Requests before those that are replayed: code comes sparsely there."""
WARM_UP = 0.2


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    policies: Sequence[str]
    rates: Sequence[float]
    """Rising; empty: as the policy needs."""
    requests: int
    prefixes: bool = True

    def rates_from(self, first: float) -> Sequence[float]:
        """Those to try, from one on."""
        steps = range(1 + int(math.log(MOST_RATE / first) / math.log(RATE_STEP)))
        return self.rates or [round(first * RATE_STEP**at, 2) for at in steps]


@dataclass(frozen=True)
class Run:
    """One policy at one rate."""

    policy: str
    rate: float
    figures: Mapping[str, Any]
    """As `kvmesh-testkit replay-load` prints them."""
    machine: float
    """Share of all cores that were busy."""
    repeats: int

    @property
    def void(self) -> bool:
        """The client was not able to bring the load."""
        late: float = self.figures["late_ms"]["max"]
        return self.figures["own_cpu"] > CPU_LIMIT or late > LATE_LIMIT_MS

    def share(self, name: str) -> float:
        """Of a class, within its targets."""
        for one in self.figures["classes"]:
            if one["class"] == name:
                good: float = one["good"] / one["requests"] if one["requests"] else float("nan")
                return good
        return float("nan")

    def quantile(self, name: str, what: str, part: str) -> float | None:
        """Of a class."""
        for one in self.figures["classes"]:
            if one["class"] == name and one[what]["count"]:
                found: float = one[what][part]
                return found
        return None

    def row(self) -> list[object]:
        """Of the table."""
        return [
            self.policy, self.rate,
            f"{self.share('interactive'):.1%}", f"{self.share('standard'):.1%}",
            self.quantile("interactive", "first_token_ms", "p50"),
            self.quantile("interactive", "first_token_ms", "p90"),
            self.quantile("interactive", "itl_ms", "p90"),
            self.quantile("standard", "first_token_ms", "p90"),
            f"{self.machine:.0%}", f"{self.figures['own_cpu']:.2f}",
            self.figures["late_ms"]["max"], "void" if self.void else "",
        ]  # fmt: skip


HEAD = (
    "policy", "requests/s", "interactive", "standard", "TTFT p50", "p90", "ITL p90",
    "standard TTFT p90", "machine", "client core", "latest ms", "",
)  # fmt: skip


@dataclass
class Walk:
    """A policy at rising rates."""

    policy: str
    runs: list[Run] = field(default_factory=list)

    @property
    def valid(self) -> list[Run]:
        """Those that count."""
        return [run for run in self.runs if not run.void]

    def knee(self) -> tuple[float, bool]:
        """Highest rate up to which SERVED of the interactive requests are within their targets,
        between two rates as on a line; and whether it was seen: else it lies beyond the last."""
        before: Run | None = None
        for run in self.valid:
            share = run.share("interactive")
            if share < SERVED:
                if before is None:
                    return 0.0, True
                down = (before.share("interactive") - SERVED) / (
                    before.share("interactive") - share
                )
                return before.rate + (run.rate - before.rate) * down, True
            before = run
        return (before.rate if before else 0.0), False


# -- load ------------------------------------------------------------------------------------


def merged(traces: Path, prefixes: bool) -> list[Arrival]:
    """Both traces from where both flow, in the order of their arrival."""
    found: list[Arrival] = []
    for request_class, name in TRACES.items():
        rows = azure((traces / name).read_text(encoding="utf-8"))
        if prefixes:
            rows = with_prefixes(rows, BLOCK_TOKENS, name)
        found += [replace(one, request_class=request_class) for one in rows]
    found = sorted(found, key=lambda one: one.at_ms)[SKIPPED:]
    return [replace(one, at_ms=one.at_ms - found[0].at_ms) for one in found]


def roles(text: str) -> list[str]:
    """`4` as workers for both, `2P2D` as two of each. Raises SystemExit."""
    if found := re.fullmatch(r"(\d+)P(\d+)D", text):
        return ["prefill"] * int(found[1]) + ["decode"] * int(found[2])
    if text.isdigit() and int(text):
        return ["both"] * int(text)
    raise SystemExit(f"--cluster is {text!r}; allowed is as 4 or 2P2D")


@contextlib.contextmanager
def serving(policy: str, workers: Sequence[str]) -> Iterator[Cluster]:
    """A cluster under a policy."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), as_shipped=True)
        try:
            name, first_come, _ = policy.partition(FIRST_COME)
            queue = ("--queue-order", "arrival", "--dispatch-ahead", "1h") if first_come else ()
            endpoint = cluster.start_router("--policy", name, *queue)
            names = [f"{role}-{number}" for number, role in enumerate(workers)]
            pool = ("--kv-pool-tokens", str(POOL_TOKENS), "--engine-arguments", PROFILE)
            for name, role in zip(names, workers, strict=True):
                cluster.start_worker(name, role, *pool)
            cluster.wait_live(endpoint, *names)
            yield cluster
        finally:
            cluster.close()


def bring(
    testkit: Path, cluster: Cluster, policy: str, rate: float, arrivals: Sequence[Arrival],
    plan: Plan,
) -> Run:  # fmt: skip
    """One run; again while it is void."""
    for repeats in range(MOST_REPEATS + 1):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write(json_lines(arrivals))
            file.flush()
            command = [
                *(str(testkit), "replay-load", "--target", cluster.endpoints[0]),
                *("--arrivals", file.name, "--block-tokens", str(BLOCK_TOKENS)),
                # Nothing of another run is in a cache.
                *("--seed", str(round(1e3 * rate) * (MOST_REPEATS + 1) + repeats)),
                *("--warm-up", str(WARM_UP * len(arrivals) / rate), "--grace", str(GRACE_S)),
            ]
            busy, began = machine_busy_seconds(), time.monotonic()
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=go_first
            )
            took = (time.monotonic() - began) * (os.cpu_count() or 1)
            machine = (machine_busy_seconds() - busy) / took
        cluster.assert_alive()
        run = Run(policy, rate, json.loads(done.stdout), machine, repeats)
        if not run.void:
            break
        say(f"{policy} at {rate:g}/s was void ({run.row()[-3:-1]})")
    if run.figures["first_error"]:
        say(f"{policy} at {rate:g}/s: first error: {run.figures['first_error']}")
    return run


def go_first() -> None:
    """The client is the clock of a run: it goes before who is measured, where it may."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


def tried(
    policy: str, rate: float, arrivals: Sequence[Arrival], plan: Plan,
    run_at: Callable[[float, Sequence[Arrival]], Run],
) -> Run:  # fmt: skip
    """A policy at one rate."""
    run = run_at(rate, at_rate(arrivals, rate, plan.requests))
    say(f"{policy} at {rate:g}/s: {run.share('interactive'):.1%} interactive in time")
    return run


def walk(
    policy: str, arrivals: Sequence[Arrival], plan: Plan, first: float,
    run_at: Callable[[float, Sequence[Arrival]], Run],
) -> Walk:  # fmt: skip
    """A policy at rising rates, until too few are within their targets."""
    found = Walk(policy)
    for rate in plan.rates_from(first):
        run = tried(policy, rate, arrivals, plan, run_at)
        found.runs.append(run)
        if not run.void and run.share("interactive") < STOP_BELOW:
            break
    return found


def bracket(
    policy: str, arrivals: Sequence[Arrival], plan: Plan, first: float,
    run_at: Callable[[float, Sequence[Arrival]], Run],
) -> Walk:  # fmt: skip
    """A policy at rates around one, until two that follow each other have its knee between."""
    runs: dict[float, Run] = {}
    rate, up = first, None
    while LEAST_RATE <= rate <= MOST_RATE:
        run = runs[rate] = tried(policy, rate, arrivals, plan, run_at)
        enough = run.share("interactive") >= SERVED
        up = enough if up is None else up
        if enough != up or run.void:
            break
        rate = round(rate * (RATE_STEP if up else 1 / RATE_STEP), 2)
    return Walk(policy, [runs[rate] for rate in sorted(runs)])


def live(
    testkit: Path, policy: str, workers: Sequence[str], arrivals: Sequence[Arrival], plan: Plan
) -> Walk:
    """A policy on a cluster of its own."""
    predicted = LEAST_RATE
    if not plan.rates:
        predicted = max(LEAST_RATE, round(simulated(policy, workers, arrivals, plan).knee()[0], 2))
    steps = walk if plan.rates else bracket
    with serving(policy, workers) as cluster:
        return steps(
            policy,
            arrivals,
            plan,
            predicted,
            lambda rate, scaled: bring(testkit, cluster, policy, rate, scaled, plan),
        )


def simulated(policy: str, workers: Sequence[str], arrivals: Sequence[Arrival], plan: Plan) -> Walk:
    """The same in the simulator: what is to be expected, in a minute."""
    cluster = workers_of(workers, SPEED, POOL_TOKENS)

    def run_at(rate: float, scaled: Sequence[Arrival]) -> Run:
        name, first_come, _ = policy.partition(FIRST_COME)
        figures = simulate(cluster, name, bool(first_come), scaled, BLOCK_TOKENS, WARM_UP)
        return Run(policy, rate, figures, 0.0, 0)

    return walk(policy, arrivals, plan, LEAST_RATE, run_at)


# -- results ---------------------------------------------------------------------------------


def figures_of(walks: Sequence[Walk]) -> list[Figure]:
    """Ours over the others, where theirs was seen: the whole, and placement alone."""
    knees = {walk.policy: walk.knee() for walk in walks}
    ours, _ = knees.pop(OURS, (0.0, False))
    found = []
    for title, end in (("goodput", FIRST_COME), ("placement", "")):
        alike = {name: of for name, of in knees.items() if name.endswith(FIRST_COME) == bool(end)}
        # One whose rate was not seen may be the best.
        complete = all(seen for _, seen in alike.values())
        theirs, seen = alike.get(f"round-robin{end}", (0.0, False))
        if ours and theirs and seen:
            figure = Figure(f"{title}_over_round_robin", ours / theirs, "ratio", "higher")
            found.append(figure)
        best = max((knee for knee, _ in alike.values()), default=0.0)
        if ours and best and complete:
            found.append(Figure(f"{title}_over_best_baseline", ours / best, "ratio", "higher"))
    return found


def show(walks: Sequence[Walk], title: str) -> None:
    """Both tables."""
    rows = [run.row() for walk in walks for run in walk.runs]
    print(f"{title}.")
    print_table("share within their targets", HEAD, rows)
    knees = []
    for one in walks:
        rate, seen = one.knee()
        knees.append(
            [
                one.policy,
                rate if seen else f"over {rate:.3g}",
                sum(run.void for run in one.runs),
                sum(run.repeats for run in one.runs),
            ]
        )
    print_table(
        f"rate with {SERVED:.0%} of the interactive requests within their targets",
        ("policy", "requests/s", "void", "made again"),
        knees,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute; no evidence")
    parser.add_argument("--json", type=Path, help="write figures and runs here")
    add_traces(parser)
    parser.add_argument("--cluster", default="2P2D", help="workers: as 2P2D, or 4 for both")
    parser.add_argument("--policies", type=lambda text: text.split(","))
    parser.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--requests", type=int, help="how many")
    parser.add_argument("--no-prefixes", action="store_true", help="prompts share nothing")
    parser.add_argument("--simulated", action="store_true", help="in the simulator, not live")
    parser.add_argument("--testkit", type=Path, help="binary; default: built from here")
    return parser.parse_args(arguments)


def plan_of(args: argparse.Namespace) -> Plan:
    """How much is measured, as asked for."""
    policies: Sequence[str] = (
        OURS,
        *(name + end for end in (FIRST_COME, "") for name in BASELINES),
    )
    requests, rates = 900, list[float]()
    if args.quick:
        policies = (OURS, f"round-robin{FIRST_COME}", "round-robin")
        requests, rates = 120, [16.0, 22.0]
    return Plan(
        args.policies or policies,
        sorted(args.rates or rates),
        args.requests or requests,
        not args.no_prefixes,
    )


def main() -> int:
    """Runs it; the exit status."""
    args = parse()
    need_traces(args.traces, TRACES.values())
    plan, workers = plan_of(args), roles(args.cluster)
    arrivals = merged(args.traces, plan.prefixes)
    title = f"{args.cluster} sim workers, the same {plan.requests:,} requests at each rate"
    if not plan.prefixes:
        title += ", no prefixes"
    if args.quick:
        title += ". Not evidence: a quick run"
    if args.simulated:
        title += ". In the simulator: no evidence of what is live"
        walks = [simulated(policy, workers, arrivals, plan) for policy in plan.policies]
    else:
        testkit = (args.testkit or build("kvmesh-testkit")[0]).resolve()
        walks = [live(testkit, policy, workers, arrivals, plan) for policy in plan.policies]
    show(walks, title)
    figures = figures_of(walks)
    print_figures(figures)
    if args.json:
        runs = [
            {"void": run.void, **vars(run)} for walk in walks for run in walk.runs
        ]  # fmt: skip
        knees = {walk.policy: walk.knee() for walk in walks}
        write_json(args.json, figures, quick=args.quick, title=title, knees=knees, runs=runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
