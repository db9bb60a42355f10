"""Does anything grow that should not, while everything comes and goes for an hour?

Real processes on loopback: etcd, two routers, a prefill, two decode and a worker of both roles
with the simulated engine. Clients of gRPC and of OpenAI's HTTP ask all the time, most of them for
prompts that nobody asked for before, and most of what can happen to a request happens: it is read
to its end, fast, slowly or not at all; left at any point, with a reset or without a word; late for
its deadline; refused; resumed at the other router. New connections come all the time. One decode
worker is drained and replaced by a new process again and again, and the sessions of the worker of
both roles are reset. What is asked for, and when what is broken, follows from the seed.

    python benchmarks/churn.py [--quick] [--json FILE] [--seed N] [--minutes M]

Figures, of those processes that lived all the time, by role: resident memory after the first sixth
of the time, at its end, the most of it, and how it grew in between (least squares over a sample a
second); what is left when all clients have gone (descriptors, threads, streams, tasks, requests,
blocks, transfers, beyond what there was before they came); requests by how they ended.

To reach: nothing left, no stream that finished with wrong tokens, and memory flat: growth of at
most 1 MiB an hour, or 2 % of what was resident after the first sixth, whichever is more. Before
that memory may grow: the prefix index, the KV pools and what is known of their blocks fill, as do
the records of past decisions, of cache events and of what was said to routers; allocators keep what
a burst needed, a little in each thread's arena; code that never ran before is read in. All of these
have bounds, and those that are settings are set here so low that they are reached within minutes.
So what grows later grows without a bound. (As shipped some take hours.) Parts of other workers'
pools are mapped while KV comes from there, and count: a megabyte or two that come and go.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from alternating import Figure, print_figures, print_table, say, write_json
from churn_calls import POINTS
from churn_load import CONTEXT_TOKENS, ENDS, KINDS, Load, Tally
from overload_load import rss_mib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

from cluster import Cluster
from fault_proxy import FaultProxy
from figures import QUIET, figures, wait_figures
from held import Held, held, left_over

CLIENTS = 24
ROUTER = (
    *("--decisions-kept", "256", "--index-bytes", "1MiB", "--orphan-ttl", "3s"),
    *("--slow-client-timeout", "5s"),
)
WORKER = (
    *("--engine-arguments", f"profile=step-10ms,context_length={CONTEXT_TOKENS}"),
    *("--kv-pool-tokens", "8192", "--orphan-ttl", "3s", "--cache-ring-events", "1024"),
    *("--resume-bytes", "1048576", "--replay-bytes", "262144"),
)
ROLES = {"p": "prefill", "d": "decode", "b": "both", "again": "decode"}
RESET, REPLACED = "b", "again"
"""The worker whose sessions go by a proxy and are reset, and the one that is drained and replaced:
its memory starts anew, and is not measured."""
WARM_UP = 1 / 6
"""Of the time."""
EDGE = 1 / 12
"""Of the time after that: what was resident at its begin and end is the median over so much."""
FLAT_MIB_H, FLAT_SHARE_H = 1.0, 0.02
FULL_MINUTES = 60.0
SAMPLE_S, SAY_S = 1.0, 60.0
QUIET_S = 600.0
"""What has not gone by then is left. Nothing takes longer than 15 s, on a machine that has time."""
SHOWN = 20
"""Problems that are printed."""


@dataclass(frozen=True)
class Plan:
    """Times, seconds."""

    settle_s: float
    """Churn before anything is counted: connections and threads that stay are made in it."""
    rest_s: float
    """Then nobody asks: workers close the connections between them that were idle for 30 s."""
    churn_s: float
    replace_s: float
    """Mean time from one drain to the next."""
    reset_s: float


FULL = Plan(60.0, 45.0, FULL_MINUTES * 60, 120.0, 45.0)
QUICK = Plan(5.0, 2.0, 15.0, 8.0, 4.0)


@dataclass
class Memory:
    """What was resident of a process: when (of `time.monotonic`), MiB."""

    name: str
    role: str
    samples: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Growth:
    """What is read from a process's samples, MiB."""

    name: str
    role: str
    warm: float
    end: float
    peak: float
    grown_h: float
    """An hour."""

    @property
    def allowed_h(self) -> float:
        """What counts as flat."""
        return max(FLAT_MIB_H, FLAT_SHARE_H * self.warm)

    @property
    def is_flat(self) -> bool:
        """Whether it is."""
        return self.grown_h <= self.allowed_h


def growth(memory: Memory, begin: float, end: float) -> Growth:
    """Of the samples of a time, whose first part is the warm-up."""
    warm = begin + WARM_UP * (end - begin)
    edge = EDGE * (end - warm)
    samples = [(at, mib) for at, mib in memory.samples if warm <= at <= end]
    slope = statistics.linear_regression(*zip(*samples, strict=True)).slope
    return Growth(
        memory.name,
        memory.role,
        statistics.median(mib for at, mib in samples if at <= warm + edge),
        statistics.median(mib for at, mib in samples if at >= end - edge),
        max(mib for _, mib in samples),
        3_600 * slope,
    )


@contextmanager
def sampled(pids: Mapping[int, Memory]) -> Iterator[None]:
    """Inside, a thread takes a sample a second of each process."""
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(SAMPLE_S):
            for pid, memory in pids.items():
                try:
                    memory.samples.append((time.monotonic(), rss_mib(pid)))
                except FileNotFoundError:
                    # It died: whoever waits for the cluster's processes says so.
                    return

    thread = threading.Thread(target=sample, name="samples", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


class Churned:
    """A cluster and what happens to it; a context manager."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.replaced = self.resets = 0
        self._seed = seed
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.push(self._stack)
            self.cluster = Cluster(folder)
            self._stack.callback(self.cluster.close)
            # Reached by its proxy alone, so that its sessions can be reset.
            self.cluster.start_worker(RESET, ROLES[RESET], *WORKER, "--etcd", "")
            address = self.cluster.worker_address(RESET)
            self._proxy = self._stack.enter_context(FaultProxy(address))
            for name, role in ROLES.items():
                if name != RESET:
                    self.cluster.begin_worker(name, role, *WORKER)
            for _ in range(2):
                self.cluster.start_router(*ROUTER, "--workers", self._proxy.address)
            self._wait_live()
            undo.pop_all()

    def __enter__(self) -> Churned:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def processes(self) -> dict[int, Memory]:
        """Those that live all the time, by their ids."""
        routers = {
            child.process.pid: Memory(child.name, "router")
            for child in self.cluster.routers.values()
        }
        return routers | {
            child.process.pid: Memory(name, ROLES[name])
            for name, child in self.cluster.workers.items()
            if name != REPLACED
        }

    def churn(
        self, seconds: float, *, replace_s: float, reset_s: float
    ) -> tuple[Tally, float, float]:
        """Clients ask, a worker and sessions come and go, so often on average. What the clients
        did; from when to when they did it."""
        part = f"{self._seed}/{seconds:g}"
        rng = random.Random(part)
        means = {self._replace: replace_s, self._reset: reset_s}
        load = Load(self.cluster.endpoints, CLIENTS, part)
        try:
            begin = time.monotonic()
            due = {act: begin + mean * rng.uniform(0.5, 1.5) for act, mean in means.items()}
            say_next = begin + SAY_S
            while (now := time.monotonic()) < begin + seconds:
                for act, at in due.items():
                    if at <= now:
                        act()
                        due[act] = time.monotonic() + means[act] * rng.uniform(0.5, 1.5)
                if say_next <= now:
                    say_next += SAY_S
                    say(f"{(now - begin) / 60:.0f} minutes: {dict(load.tally().ends)}")
                # Both raise where what was to live has ended.
                self.cluster.children.wait(SAMPLE_S)
                load.tally()
            end = time.monotonic()
            return load.stop(), begin, end
        finally:
            load.leave()

    def _replace(self) -> None:
        """Drained, with time to hand its streams over, and started again as a new process."""
        self.cluster.stop(REPLACED)
        self.cluster.start_worker(REPLACED, ROLES[REPLACED], *WORKER)
        self.replaced += 1

    def _reset(self) -> None:
        self._proxy.tell("reset")
        self.resets += 1

    def _wait_live(self) -> None:
        for endpoint in self.cluster.endpoints:
            self.cluster.wait_live(endpoint, *ROLES)


def at_rest(cluster: Cluster, idle: Mapping[str, float], seconds: float) -> Held:
    """What is held where nobody asks for anything: the least of so long. `idle`: connections of
    each router without clients."""
    cluster.wait_empty(*cluster.workers, seconds=QUIET_S)
    for endpoint, connections in idle.items():
        wanted = {**dict.fromkeys(QUIET, 0.0), "connections": connections}
        wait_figures(cluster, endpoint, wanted, QUIET_S)
    least = held(cluster)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        cluster.children.wait(SAMPLE_S)
        least = {what: min(least[what], count) for what, count in held(cluster).items()}
    return least


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    tally: Tally
    seconds: float
    growths: list[Growth]
    left: Held
    """What is held beyond the begin, by process and kind."""
    replaced: int
    resets: int
    samples: dict[str, list[tuple[float, float]]]
    """Of each process: seconds since the begin, MiB."""


def run(plan: Plan, seed: int) -> Outcome:
    """A cluster, its churn, and what is left of it."""
    with tempfile.TemporaryDirectory() as folder, Churned(Path(folder), seed) as churned:
        idle = {at: figures(at)["connections"] for at in churned.cluster.endpoints}
        churned.churn(plan.settle_s, replace_s=plan.settle_s / 2, reset_s=plan.settle_s / 3)
        before = at_rest(churned.cluster, idle, plan.rest_s)
        say(f"churn for {plan.churn_s / 60:g} minutes")
        churned.replaced = churned.resets = 0
        processes = churned.processes()
        with sampled(processes):
            tally, begin, end = churned.churn(
                plan.churn_s, replace_s=plan.replace_s, reset_s=plan.reset_s
            )
        say("all clients have gone: what is left?")
        left = left_over(churned.cluster, before, QUIET_S)
        churned.cluster.assert_alive()
        return Outcome(
            tally,
            end - begin,
            [growth(memory, begin, end) for memory in processes.values()],
            left,
            churned.replaced,
            churned.resets,
            {
                memory.name: [(round(at - begin, 2), mib) for at, mib in memory.samples]
                for memory in processes.values()
            },
        )


def figures_of(outcome: Outcome) -> list[Figure]:
    """Of a run. Of a role the worst of its processes counts."""
    found = []
    for role in dict.fromkeys(one.role for one in outcome.growths):
        of = [one for one in outcome.growths if one.role == role]
        found += [
            Figure(f"{role}_rss_warm_mib", max(one.warm for one in of), "MiB", "lower"),
            Figure(f"{role}_rss_end_mib", max(one.end for one in of), "MiB", "lower"),
            Figure(f"{role}_rss_peak_mib", max(one.peak for one in of), "MiB", "lower"),
            Figure(f"{role}_rss_growth_mib_h", max(one.grown_h for one in of), "MiB/h", "lower"),
        ]
    not_flat = sum(not one.is_flat for one in outcome.growths)
    found += [
        Figure("processes_not_flat", not_flat, "processes", "lower"),
        Figure("left_over", sum(outcome.left.values()), "things", "lower"),
        Figure("requests", outcome.tally.ends.total(), "requests", "higher"),
    ]
    better = {"failed": "lower", "bad": "lower"}
    return found + [
        Figure(f"{end.replace(' ', '_')}_requests", outcome.tally.ends[end], "requests",
               "lower" if end in better else "higher")
        for end in ENDS
    ]  # fmt: skip


def show(outcome: Outcome) -> None:
    """The tables."""
    ends = outcome.tally.ends
    print_table(
        f"{outcome.seconds / 60:.1f} minutes: {ends.total()} requests "
        f"({ends.total() / outcome.seconds:.1f}/s) of {CLIENTS} clients, worker replaced "
        f"{outcome.replaced} times, sessions reset {outcome.resets} times",
        ["ended", "requests"],
        [[end, ends[end]] for end in ENDS],
    )
    print_table("what clients did", ["kind", "times"], [[k, outcome.tally.kinds[k]] for k in KINDS])
    print_table("left", ["at", "times"], [[at, outcome.tally.left_at[at]] for at in POINTS])
    print_table(
        "resident memory, MiB (growth: an hour, from the end of the warm-up on)",
        ["process", "role", "warm", "end", "peak", "growth", "allowed", "flat"],
        [
            [one.name, one.role, one.warm, one.end, one.peak, one.grown_h, one.allowed_h,
             "yes" if one.is_flat else "no"]
            for one in outcome.growths
        ],
    )  # fmt: skip
    print(f"\n{outcome.tally.continued} of those resumed were had by nobody, and went on anew")
    print_table("left over", ["what", "more than before"], [[*one] for one in outcome.left.items()])
    for problem in outcome.tally.problems[:SHOWN]:
        print(problem[:600])


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; not evidence")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=7, help="of all that is random")
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES, help="length of the churn")
    options = parser.parse_args()
    plan = QUICK if options.quick else replace(FULL, churn_s=options.minutes * 60)
    outcome = run(plan, options.seed)
    show(outcome)
    found = figures_of(outcome)
    print_figures(found)
    enough = options.minutes >= FULL_MINUTES and not options.quick
    if not enough:
        why = "a quick run" if options.quick else "shorter than an hour"
        print(f"\nNot evidence: {why}. What fills takes minutes: memory is not flat before.")
    if options.json is not None:
        write_json(
            options.json,
            found,
            evidence=enough,
            seed=options.seed,
            processes=[asdict(one) for one in outcome.growths],
            left_over=outcome.left,
            kinds=outcome.tally.kinds,
            left_at=outcome.tally.left_at,
            continued=outcome.tally.continued,
            problems=outcome.tally.problems,
            samples=outcome.samples,
        )


if __name__ == "__main__":
    main()
