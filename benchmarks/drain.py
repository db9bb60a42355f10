"""How long streams stand still when their worker is drained.

Real processes on loopback, the simulated engine with steps of 25 ms: one prefill worker and two
that decode, under streams that all run. A decode worker gets SIGTERM and is replaced, in turn, in
two ways: with time, so that its streams are handed over with their KV; and with none, so that it
gives them back and their KV is computed again. A gap is the longest time between two tokens of a
stream around the drain, as its client sees it, in steps of the receiver.

    python benchmarks/drain.py [--quick] [--json FILE] [--streams N] [--rounds N]

To reach: at most 2 steps, with nothing computed again and no stream that fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from alternating import Figure, print_figures, print_table, write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

from cluster import Cluster
from figures import figures as metrics

import kvmesh

STEP_MS = 25.0
WORKER = (
    *("--engine-arguments", f"profile=step-10ms,speed={10.0 / STEP_MS}"),
    # Room for all streams at once, as long as they get.
    *("--kv-pool-tokens", "262144"),
)
GRACES = {"handed over": "60s", "given back": "1ms"}
PROMPT_TOKENS = 500
OUTPUT_TOKENS = 7_000
"""More than a run needs."""
VOCABULARY = range(100, 2_000)
WAIT_S = 120.0


@dataclass
class Load:
    """Streams that run until they are told to stop; when each token of theirs came."""

    endpoint: str
    count: int
    came: list[list[float]] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    async def _one(self, client: kvmesh.AsyncClient, number: int) -> None:
        rng = random.Random(f"{number} {time.monotonic_ns()}")
        came = self.came[number]
        stream = client.generate(
            token_ids=rng.choices(VOCABULARY, k=PROMPT_TOKENS),
            max_tokens=OUTPUT_TOKENS,
            ignore_end_of_text=True,
        )
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                if isinstance(event, kvmesh.Tokens):
                    came.append(time.perf_counter())
                if self.stopped.is_set():
                    return

    async def _all(self) -> None:
        async with kvmesh.AsyncClient(self.endpoint) as client, asyncio.TaskGroup() as group:
            for number in range(self.count):
                group.create_task(self._one(client, number))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """All streams run inside; one that ends by itself fails."""
        self.came = [[] for _ in range(self.count)]

        def run() -> None:
            try:
                asyncio.run(self._all())
            except BaseException as error:
                self.failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            self.wait(20)
            yield
        finally:
            self.stopped.set()
            thread.join(WAIT_S)
        self._check()

    def _check(self) -> None:
        if self.failed:
            raise SystemExit(f"a stream failed: {self.failed[0]!r}")

    def wait(self, tokens: int) -> None:
        """Until each stream has so many more tokens than now."""
        goals = [len(came) + tokens for came in self.came]
        deadline = time.monotonic() + WAIT_S
        while any(len(came) < goal for came, goal in zip(self.came, goals, strict=True)):
            self._check()
            if time.monotonic() > deadline:
                raise SystemExit("the streams stand still")
            time.sleep(0.01)


def gap_steps(came: list[float], begin: float, end: float) -> float:
    """Longest time between two tokens of which one came in this time, in steps."""
    pairs = itertools.pairwise(came)
    return max(1e3 * (b - a) / STEP_MS for a, b in pairs if b >= begin and a <= end)


@dataclass
class Drain:
    """What one drain came to."""

    way: str
    gaps: list[float]
    """Of all streams, in steps. Those that were not on the worker have gaps of one."""
    moved: int
    recomputed: float
    failed: float


def drain(cluster: Cluster, way: str, load: Load, name: str, replaced: str) -> Drain:
    """Drains a worker under load and starts another one."""
    endpoint = load.endpoint
    before = metrics(endpoint)
    moved = cluster.table(endpoint)[name].load.own.decoding
    begin = time.perf_counter()
    cluster.stop(name)
    load.wait(8)
    end = time.perf_counter()
    gaps = [gap_steps(came, begin, end) for came in load.came]
    after = metrics(endpoint)
    cluster.start_worker(replaced, "decode", *WORKER, "--grace", GRACES[way])
    cluster.wait_live(endpoint, replaced)
    grown = {
        key: after.total(key) - before.total(key)
        for key in ("recomputed_tokens_total", "failed_total")
    }
    return Drain(way, gaps, moved, grown["recomputed_tokens_total"], grown["failed_total"])


def run(way: str, streams: int, rounds: int, folder: Path) -> list[Drain]:
    """All drains of one way, in a cluster of its own."""
    with contextlib.ExitStack() as stack:
        cluster = Cluster(folder)
        stack.callback(cluster.close)
        endpoint = cluster.start_router()
        cluster.begin_worker("p", "prefill", *WORKER)
        names = ["d0", "d1"]
        for name in names:
            cluster.begin_worker(name, "decode", *WORKER, "--grace", GRACES[way])
        cluster.wait_live(endpoint, "p", *names)
        load = Load(endpoint, streams)
        found = []
        with load.running():
            for number in range(rounds):
                names.append(f"d{number + 2}")
                # The one that has had its streams for longer.
                found.append(drain(cluster, way, load, names[number], names[-1]))
                load.wait(8)
        return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; not evidence")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--streams", type=int, default=24, help="streams at once")
    parser.add_argument("--rounds", type=int, default=6, help="drains of each way")
    options = parser.parse_args()
    streams, rounds = (8, 1) if options.quick else (options.streams, options.rounds)
    drains: dict[str, list[Drain]] = {}
    for way in GRACES:
        with tempfile.TemporaryDirectory() as folder:
            drains[way] = run(way, streams, rounds, Path(folder))
    print_table(
        f"drains under {streams} streams of {PROMPT_TOKENS} prompt tokens; gaps in steps of "
        f"{STEP_MS:g} ms",
        ["way", "moved", "median gap", "longest gap", "tokens computed again", "failed"],
        [
            [way, one.moved, statistics.median(one.gaps), max(one.gaps), one.recomputed, one.failed]
            for way, of in drains.items()
            for one in of
        ],
    )
    handed, given = drains["handed over"], drains["given back"]
    longest = [max(one.gaps) for one in handed]
    found = [
        Figure("drain_gap_steps", max(longest), "steps", "lower"),
        Figure("drain_gap_steps_median", statistics.median(longest), "steps", "lower"),
        Figure("recomputed_tokens", sum(one.recomputed for one in handed), "tokens", "lower"),
        Figure("failed_streams", sum(one.failed for one in handed), "streams", "lower"),
        Figure("given_back_gap_steps", max(max(one.gaps) for one in given), "steps", "lower"),
    ]
    print_figures(found)
    if options.quick:
        print("\nNot evidence: a quick run.")
    if options.json is not None:
        write_json(options.json, found, evidence=not options.quick, streams=streams, rounds=rounds)


if __name__ == "__main__":
    main()
