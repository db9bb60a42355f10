"""Do the router's predictions hold, do two routers herd, and what does late news of load cost?

Real processes: etcd, routers, workers; requests over gRPC, arrivals open-loop and seeded.

    python benchmarks/routing_live.py [--quick] [--json FILE] [--parts sim,pairs,both,herd,late]
        [--sim-seconds S] [--torch-seconds S]

sim, pairs, both: the same arrivals are run twice. A request's prediction is the one made at the
placement that brought its first token (Explain), held against what that first token really took
from there; its error is |predicted - actual| / actual. The deviation of the two runs, request by
request, is the noise that no prediction can be under. The simulator replays the same arrivals, and
its percentiles stand beside the live ones.

herd: two routers, four equal workers, a burst of 32 requests within one step, half at each
router. late: the same arrivals with load reports at once and with each report told 500 ms after it
was true, at a load at which requests wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
from alternating import Figure, print_table, quantile, write_json
from simulated import replay

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from cluster import Cluster  # noqa: E402

from kvmesh import Accepted, AsyncClient, Finished, Tokens  # noqa: E402
from kvmesh.v1 import admin_pb2, admin_pb2_grpc, worker_pb2  # noqa: E402

BURST = 32
BURST_WORKERS = 4
LATE_MS = 500


@dataclass(frozen=True)
class Arrival:
    """One request: when, since the start of a run, and what."""

    at_s: float
    ids: tuple[int, ...]
    output_tokens: int

    @property
    def request(self) -> tuple[float, tuple[int, ...], int]:
        """As the simulator takes it."""
        return self.at_s, self.ids, self.output_tokens


@dataclass(frozen=True)
class Load:
    """A shared-prefix chat load."""

    rate: float
    """Arrivals a second."""
    system_tokens: int
    """Length of each of the shared prefixes."""
    systems: int
    turn_tokens: tuple[int, int]
    """New prompt tokens of a turn: least and most."""
    output_tokens: tuple[int, int]
    conversations: int
    """Conversations that go on at a time; a turn continues one of them."""
    turns: int
    """Most turns of a conversation; then a fresh one takes its place."""
    vocabulary: range

    def arrivals(self, seconds: float, seed: int) -> list[Arrival]:
        """Seeded Poisson arrivals. The answer of a turn is made-up text of its length, so that a
        run's arrivals do not depend on what the model said."""
        rng = random.Random(seed)
        systems = [self._text(rng, self.system_tokens) for _ in range(self.systems)]
        running: list[tuple[list[int], int]] = []
        found, at = [], rng.expovariate(self.rate)
        while at < seconds:
            if len(running) < self.conversations:
                running.append((list(rng.choice(systems)), 0))
            place = rng.randrange(len(running))
            history, turn = running[place]
            history = history + self._text(rng, rng.randint(*self.turn_tokens))
            output = rng.randint(*self.output_tokens)
            found.append(Arrival(at, tuple(history), output))
            running[place] = (history + self._text(rng, output), turn + 1)
            if turn + 1 >= self.turns:
                running.pop(place)
            at += rng.expovariate(self.rate)
        return found

    def _text(self, rng: random.Random, tokens: int) -> list[int]:
        return rng.choices(self.vocabulary, k=tokens)


SIM_LOAD = Load(
    rate=6.0, system_tokens=2048, systems=6, turn_tokens=(64, 1024), output_tokens=(16, 96),
    conversations=24, turns=6, vocabulary=range(300, 1900),
)  # fmt: skip
# Four workers of the default profile are busy some seven tenths of the time: requests wait.
LATE_LOAD = replace(SIM_LOAD, rate=24.0, conversations=96)
# A prompt token takes some 6 ms on one core here: short prompts, few arrivals.
TORCH_LOAD = Load(
    rate=0.25, system_tokens=128, systems=3, turn_tokens=(16, 160), output_tokens=(8, 24),
    conversations=6, turns=4, vocabulary=range(1000, 40_000),
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What became of an arrival, ms."""

    ttft: float
    """At the client."""
    predicted: float
    """After the placement that brought the first token."""
    actual: float
    """The same, as it happened."""
    cached: int


@dataclass
class Run:
    """All arrivals of one run, in their order."""

    seen: list[Seen] = field(default_factory=list)

    @property
    def errors(self) -> list[float]:
        return [abs(one.predicted - one.actual) / one.actual for one in self.seen]

    @property
    def ttft(self) -> list[float]:
        return [one.ttft for one in self.seen]


# -- one run ---------------------------------------------------------------------------------


async def ask(client: AsyncClient, admin: admin_pb2_grpc.AdminStub, arrival: Arrival) -> Seen:
    """Sends one request, waits for its end, and asks the router how it was placed."""
    begin, first, generation, cached = time.perf_counter(), 0.0, "", 0
    async for event in client.generate(
        token_ids=arrival.ids,
        max_tokens=arrival.output_tokens,
        temperature=0.0,
        ignore_end_of_text=True,
        request_class="interactive",
    ):
        if isinstance(event, Accepted):
            generation = event.generation_id
        elif isinstance(event, Tokens) and not first:
            first = time.perf_counter()
        elif isinstance(event, Finished):
            cached = event.usage.cached_tokens + event.usage.pulled_tokens
    why = await admin.Explain(admin_pb2.ExplainRequest(generation_id=generation))
    placed = next(d for d in reversed(why.decisions) if d.actual_ttft_ms)
    return Seen(1e3 * (first - begin), placed.predicted_ttft_ms, placed.actual_ttft_ms, cached)


async def play(endpoint: str, arrivals: Sequence[Arrival]) -> Run:
    """Brings arrivals at their times, whatever became of those before."""
    async with (
        AsyncClient(endpoint) as client,
        grpc.aio.insecure_channel(endpoint) as channel,
        asyncio.TaskGroup() as group,
    ):
        admin = admin_pb2_grpc.AdminStub(channel)
        begin = time.perf_counter()
        tasks = []
        for arrival in arrivals:
            # Open loop: the pace is the load's, not the cluster's.
            await asyncio.sleep(max(0.0, begin + arrival.at_s - time.perf_counter()))
            tasks.append(group.create_task(ask(client, admin, arrival)))
        await asyncio.gather(*tasks)
    return Run([task.result() for task in tasks])


@contextlib.contextmanager
def serving(
    roles: Sequence[str], *, routers: int = 1, engine: str = "sim", arguments: Sequence[str] = ()
) -> Iterator[Cluster]:
    """A cluster with a worker for each role, live at each router."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), as_shipped=True)
        try:
            endpoints = [cluster.start_router() for _ in range(routers)]
            names = [f"{role}-{number}" for number, role in enumerate(roles)]
            for name, role in zip(names, roles, strict=True):
                cluster.start_worker(name, role, *arguments, engine=engine)
            for endpoint in endpoints:
                cluster.wait_live(endpoint, *names)
            yield cluster
        finally:
            cluster.close()


# -- predictions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """Errors of predictions beside the noise of two runs, and live beside simulated."""

    name: str
    requests: int
    median_error: float
    p95_error: float
    median_noise: float
    p95_noise: float
    live: tuple[float, float]
    simulated: tuple[float, float]

    def row(self) -> list[object]:
        return [
            self.name, self.requests,
            f"{self.median_error:.3f}", f"{max(0.15, 1.5 * self.median_noise):.3f}",
            f"{self.p95_error:.3f}", f"{max(0.40, 1.5 * self.p95_noise):.3f}",
            f"{self.live[0]:.0f} / {self.live[1]:.0f}",
            f"{self.simulated[0]:.0f} / {self.simulated[1]:.0f}",
        ]  # fmt: skip

    def figures(self) -> list[Figure]:
        return [
            Figure(f"ttft_error_median_{self.name}", self.median_error, "ratio", "lower"),
            Figure(f"ttft_error_p95_{self.name}", self.p95_error, "ratio", "lower"),
            Figure(f"ttft_noise_median_{self.name}", self.median_noise, "ratio", "lower"),
            Figure(f"ttft_noise_p95_{self.name}", self.p95_noise, "ratio", "lower"),
            Figure(
                f"ttft_p50_simulated_over_live_{self.name}",
                self.simulated[0] / self.live[0], "ratio", "lower",
            ),
            Figure(
                f"ttft_p95_simulated_over_live_{self.name}",
                self.simulated[1] / self.live[1], "ratio", "lower",
            ),
        ]  # fmt: skip


def predictions(
    name: str, roles: Sequence[str], engine: str, load: Load, seconds: float
) -> Predicted:
    """Two runs of the same arrivals, each on a fresh cluster: caches begin empty in both."""
    arrivals = load.arrivals(seconds, seed=11)
    warm = load.arrivals(seconds / 5, seed=12)
    runs: list[Run] = []
    learnt: dict[str, worker_pb2.StepModel] = {}
    paths: list[admin_pb2.PathRate] = []
    for number in range(2):
        pool = ("--kv-pool-tokens", "200000") if engine == "sim" else ()
        with serving(roles, engine=engine, arguments=pool) as cluster:
            # The step model is learnt on other prompts than those that count, and read before
            # these begin: the simulator knows nothing of the requests that it is judged by.
            asyncio.run(play(cluster.endpoints[0], warm))
            table = cluster.table(cluster.endpoints[0])
            learnt |= {f"{number} {name}": one.step_model for name, one in table.items()}
            paths += [path for one in table.values() for path in one.paths_to]
            runs.append(asyncio.run(play(cluster.endpoints[0], arrivals)))
    first, second = runs
    noise = [2 * abs(a - b) / (a + b) for a, b in zip(first.ttft, second.ttft, strict=True)]
    errors = first.errors + second.errors
    live = first.ttft + second.ttft
    simulated = replay(
        [a.request for a in arrivals],
        roles,
        learnt,
        next(iter(table.values())).record,
        paths,
        warm=[a.request for a in warm],
    )
    return Predicted(
        name,
        len(arrivals),
        statistics.median(errors),
        quantile(errors, 0.95),
        statistics.median(noise),
        quantile(noise, 0.95),
        (statistics.median(live), quantile(live, 0.95)),
        (simulated.ttft_p50_ms, simulated.ttft_p95_ms),
    )


# -- two routers, late reports -----------------------------------------------------------------


def herd(bursts: int) -> list[int]:
    """Requests on the busiest of four workers, by burst."""

    async def burst(cluster: Cluster, seed: int) -> int:
        rng = random.Random(seed)
        per_router = BURST // len(cluster.endpoints)
        workers: Counter[str] = Counter()

        async def one(client: AsyncClient, admin: admin_pb2_grpc.AdminStub) -> None:
            ids = rng.choices(range(300, 1900), k=64)
            generation = ""
            async for event in client.generate(token_ids=ids, max_tokens=2, temperature=0.0):
                if isinstance(event, Accepted):
                    generation = event.generation_id
            why = await admin.Explain(admin_pb2.ExplainRequest(generation_id=generation))
            decision = why.decisions[0]
            workers[decision.plans[decision.chosen].decode_worker] += 1

        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            for endpoint in cluster.endpoints:
                client = await stack.enter_async_context(AsyncClient(endpoint))
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(endpoint))
                await client.models()
                for _ in range(per_router):
                    group.create_task(one(client, admin_pb2_grpc.AdminStub(channel)))
        assert workers.total() == BURST
        return max(workers.values())

    # A step of half a second: the burst lies within one.
    arguments = ("--engine-arguments", "profile=h100-8b,speed=0.0125")
    with serving(["both"] * BURST_WORKERS, routers=2, arguments=arguments) as cluster:
        return [asyncio.run(burst(cluster, seed)) for seed in range(bursts)]


def late(seconds: float, rounds: int) -> tuple[float, float]:
    """p99 TTFT with load reports at once, and with each told 500 ms after it was true."""
    found: dict[int, list[float]] = {0: [], LATE_MS: []}
    arrivals = LATE_LOAD.arrivals(seconds, seed=21)
    for _ in range(rounds):
        for late_ms, ttft in found.items():
            arguments = ("--load-delay", f"{late_ms}ms", "--kv-pool-tokens", "200000")
            with serving(["both"] * BURST_WORKERS, arguments=arguments) as cluster:
                ttft += asyncio.run(play(cluster.endpoints[0], arrivals)).ttft
    return quantile(found[0], 0.99), quantile(found[LATE_MS], 0.99)


PARTS = ("sim", "pairs", "both", "herd", "late")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write figures here")
    parser.add_argument("--quick", action="store_true", help="about a minute; not evidence")
    parser.add_argument("--parts", default="", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--sim-seconds", type=float, help="length of a run with the sim engine")
    parser.add_argument("--torch-seconds", type=float, help="length of a run with torch")
    options = parser.parse_args()
    parts = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts has {','.join(sorted(unknown))}; allowed are {','.join(PARTS)}")
    if options.quick and not options.parts:
        parts = ["sim", "herd"]
    sim_s = options.sim_seconds or (10 if options.quick else 90)
    torch_s = options.torch_seconds or (30 if options.quick else 190)

    figures: list[Figure] = []
    rows: list[list[object]] = []
    cases = {
        "sim": (["prefill"] * 2 + ["decode"] * 2, "sim", SIM_LOAD, sim_s),
        "pairs": (["prefill", "decode"], "torch", TORCH_LOAD, torch_s),
        "both": (["both", "both"], "torch", TORCH_LOAD, torch_s),
    }
    for name, case in cases.items():
        if name in parts:
            found = predictions(name, *case)
            rows.append(found.row())
            figures += found.figures()
    if rows:
        print_table(
            "predicted TTFT against measured, two runs of the same arrivals",
            ["", "n", "median error", "allowed", "p95 error", "allowed",
             "live p50 / p95 ms", "simulated"],
            rows,
        )  # fmt: skip
    if "herd" in parts:
        busiest = herd(3 if options.quick else 10)
        print(f"\nherd: {BURST} requests, {BURST_WORKERS} workers, 2 routers: busiest {busiest}")
        figures.append(Figure("burst_on_busiest_worker", max(busiest), "requests", "lower"))
    if "late" in parts:
        on_time, after = late(sim_s, 1 if options.quick else 3)
        print(f"late: p99 TTFT {on_time:.0f} ms, with reports {LATE_MS} ms late {after:.0f} ms")
        figures.append(Figure("late_reports_p99_ratio", after / on_time, "ratio", "lower"))
    if options.json:
        write_json(options.json, figures, quick=options.quick)


if __name__ == "__main__":
    main()
