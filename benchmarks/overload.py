"""What becomes of interactive requests where ten times as much is asked as can be served?

Real processes on loopback: etcd, a router as shipped, two workers with the simulated engine (the
steps of an 8B model on an H100, four times as long). The capacity is measured first: requests that
end a second while more are always waiting. Then the load is 0.8 of it, ten times it, and 0.8 of it
again; half of the 0.8 is interactive, a quarter each standard and batch. Two cases, each with
processes of its own: all classes grow alike, so that interactive requests alone are more than can
be served; and the others grow, while interactive requests stay as many as they were.

    python benchmarks/overload.py [--quick] [--json FILE] [--queue-timeout TIME] [--seed N]
        [--calm S] [--over S] [--after S]

Figures, of each case: the first token of interactive requests that were answered at ten times the
capacity over that at 0.8 of it (p50, p95); of those that were shed and came back when `RetryInfo`
had told them to, the share that was answered; the most memory of the router from the overload on
over the most before it; seconds from the overload's end to the first 5 s in which nobody is shed
and the median first token is within 1.3 of what it was. To reach: 1.3 for both first tokens;
recovery within 10 s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alternating import (
    BUSY_LIMIT,
    Figure,
    MachineWatch,
    descendants,
    is_evidence,
    print_figures,
    print_table,
    say,
    write_json,
)
from overload_load import (
    CLASSES,
    Load,
    Phase,
    Row,
    honesty,
    quantile,
    recovery_s,
    row,
    rss_ratio,
    times_over,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

from cluster import Cluster

from kvmesh import AsyncClient
from kvmesh.client.request import RequestClass

WORKERS = ("a", "b")
WORKER = (
    *("--engine-arguments", "profile=h100-8b,speed=0.25"),
    *("--kv-pool-tokens", "131072"),
)
SHARES: Mapping[RequestClass, float] = {"interactive": 0.5, "standard": 0.25, "batch": 0.25}
CALM, OVERLOAD = 0.8, 10.0
CASES: Mapping[str, Sequence[RequestClass]] = {"all": (), "others": ("interactive",)}
"""Classes that ask no more than before, by the name of the case."""
SATURATING = 48
"""Requests under way while the capacity is measured: more than run at once."""
LATE_LIMIT_S = 0.05
"""A client that is later than this (p99) does not bring the load."""


@dataclass(frozen=True)
class Plan:
    """How long each part lasts, and the longest wait that the router admits."""

    saturate_s: float
    calm_s: float
    over_s: float
    after_s: float
    queue_timeout: str

    def phases(self, capacity: float, keep: Sequence[RequestClass]) -> list[Phase]:
        """The three loads."""
        calm = {name: CALM * capacity * share for name, share in SHARES.items()}
        over = times_over(capacity, calm, OVERLOAD, keep)
        return [
            Phase(seconds, rates)
            for seconds, rates in ((self.calm_s, calm), (self.over_s, over), (self.after_s, calm))
        ]


FULL = Plan(20.0, 60.0, 120.0, 120.0, "60s")
"""As shipped a request may wait for a minute: an overload shorter than that is only queued."""
QUICK = Plan(6.0, 6.0, 8.0, 10.0, "3s")


@dataclass(frozen=True)
class Outcome:
    """What a case came to."""

    name: str
    capacity: float
    calm: list[Row]
    over: list[Row]
    returned: dict[str, tuple[int, int]]
    """Those that came back in the overload and after it: how many, and how many were answered."""
    told_p50_s: float | None
    """What those were told that were shed."""
    rss_ratio: float
    recovery_s: float | None
    late_p99_s: float
    others_share: float
    """Of the machine, that others used."""

    @property
    def void(self) -> bool:
        """The machine was not ours, or the client not able to bring the load."""
        return self.others_share > BUSY_LIMIT or self.late_p99_s > LATE_LIMIT_S

    def figures(self) -> list[Figure]:
        """Of this case, by its name. What was never seen is no figure."""
        calm, over = self.calm[0], self.over[0]
        found = []
        for part in ("p50", "p95"):
            before, then = getattr(calm, f"ttft_{part}_ms"), getattr(over, f"ttft_{part}_ms")
            if before and then:
                name = f"{self.name}_ttft_{part}_over_calm"
                found.append(Figure(name, then / before, "ratio", "lower"))
        came = sum(came for came, _ in self.returned.values())
        answered = sum(answered for _, answered in self.returned.values())
        if came:
            name = f"{self.name}_returned_answered"
            found.append(Figure(name, answered / came, "share", "higher"))
        found.append(Figure(f"{self.name}_router_rss_over_calm", self.rss_ratio, "ratio", "lower"))
        if self.recovery_s is not None:
            found.append(Figure(f"{self.name}_recovery_s", self.recovery_s, "s", "lower"))
        return found


async def measure(cluster: Cluster, name: str, plan: Plan, seed: int) -> Outcome:
    """A case, on processes of its own."""
    endpoint = cluster.endpoints[0]
    async with AsyncClient(endpoint, recover_s=0) as client:
        load = Load(client, random.Random(f"{name} {seed}"))
        capacity = await load.saturate(SATURATING, plan.saturate_s, SHARES)
        say(f"{name}: {capacity:.1f} requests/s can be served")
        watch = MachineWatch(descendants(os.getpid()))
        phases = plan.phases(capacity, CASES[name])
        began = await load.run(phases, cluster.routers[endpoint].process.pid)
    cluster.assert_alive()
    overload = began + plan.calm_s
    over = overload + plan.over_s
    end = over + plan.after_s
    rows = {
        begin: [row(load.asked, each, begin, until) for each in CLASSES]
        for begin, until in ((began, overload), (overload, over))
    }
    calm_p50_ms = rows[began][0].ttft_p50_ms
    if calm_p50_ms is None:
        raise SystemExit("below the capacity nobody was answered")
    told = [one.told_s for one in load.asked if one.told_s is not None]
    return Outcome(
        name, capacity, rows[began], rows[overload],
        {"in it": honesty(load.asked, overload, over), "after it": honesty(load.asked, over, end)},
        quantile(told, 0.5),
        rss_ratio(load.rss, overload),
        recovery_s(load.asked, calm_p50_ms, over, end),
        quantile(load.late_s, 0.99) or 0.0,
        watch.share_of_others(),
    )  # fmt: skip


def run(name: str, plan: Plan, seed: int) -> Outcome:
    """Starts the processes of a case, and measures."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), as_shipped=True)
        try:
            endpoint = cluster.start_router("--queue-timeout", plan.queue_timeout)
            for worker in WORKERS:
                cluster.start_worker(worker, "both", *WORKER)
            cluster.wait_live(endpoint, *WORKERS)
            return asyncio.run(measure(cluster, name, plan, seed))
        finally:
            cluster.close()


def show(outcome: Outcome, plan: Plan) -> None:
    """The tables of a case."""
    keep = CASES[outcome.name]
    print_table(
        f"{'the others grow' if keep else 'all classes grow'}: {outcome.capacity:.1f} requests/s "
        f"can be served, longest wait {plan.queue_timeout}",
        ["load", "class", "asked", "answered", "shed", "failed", "TTFT p50", "p95", "refused p95"],
        [
            [load, *asdict(each).values()]
            for load, rows in ((CALM, outcome.calm), (OVERLOAD, outcome.over))
            for each in rows
        ],
    )
    print_table(
        "told to come back, and came",
        ["when", "came", "answered"],
        [[when, *counts] for when, counts in outcome.returned.items()],
    )
    print_table(
        "the router",
        ["told s p50", "RSS over calm", "recovered after s", "client late ms p99", "others"],
        [[
            outcome.told_p50_s, outcome.rss_ratio,
            f"not in {plan.after_s:g}" if outcome.recovery_s is None else outcome.recovery_s,
            1e3 * outcome.late_p99_s, f"{outcome.others_share:.0%}",
        ]],
    )  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute or so; not evidence")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--queue-timeout", help="longest wait that the router admits")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and prompts")
    for part in ("calm", "over", "after"):
        parser.add_argument(f"--{part}", type=float, help="seconds of this part")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    base = QUICK if options.quick else FULL
    plan = Plan(
        base.saturate_s,
        options.calm or base.calm_s,
        options.over or base.over_s,
        options.after or base.after_s,
        options.queue_timeout or base.queue_timeout,
    )
    outcomes = [run(name, plan, options.seed) for name in CASES]
    for outcome in outcomes:
        show(outcome, plan)
    figures = [figure for outcome in outcomes for figure in outcome.figures()]
    print_figures(figures)
    short = options.quick or any(
        getattr(plan, part) < getattr(FULL, part) for part in ("calm_s", "over_s", "after_s")
    )
    evidence = is_evidence(quick=short, busy=any(outcome.void for outcome in outcomes))
    if options.json is not None:
        cases = [asdict(outcome) for outcome in outcomes]
        write_json(options.json, figures, evidence=evidence, plan=asdict(plan), cases=cases)


if __name__ == "__main__":
    main()
