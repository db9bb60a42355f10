"""What does a router cost a stream?

One mock worker answers twice: as a plain gRPC stream (direct) and as a worker of the router
(through). Token ids go in, detokenised text comes out. The router runs on one core, the load and
the mock worker on the other; Envoy, where it is installed, passes the direct stream on as bytes in
the same blocks. A second table has the Python worker (sim) behind a raw Attach client.

    python benchmarks/stream_overhead.py [--quick] [--parts {streams,worker}] [--json FILE]

`added` is the difference of a percentile of the first token, through minus direct, paired by
round. CPU a token is taken while streams run and none starts; CPU a request in a block of requests
of one token. The Python worker forgets a client that is gone within a moment (`ORPHAN_TTL`): by
default it goes on with its streams for 10 s, and a block would pay for those of the block before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alternating import Blocks, Figure, alternate, print_table, write_json
from streams import (
    HEAD,
    START_SECONDS,
    Bench,
    Cell,
    Reading,
    Seconds,
    Target,
    add_figure,
    blocks_of,
    build,
    find_envoy,
    free_port,
    measure,
    row,
    say_evidence,
    start_envoy,
    start_router,
)

WORKER_TOKENS = 4_000
"""Output length of the Python worker's streams; its pool holds them all."""
ORPHAN_TTL = "100ms"
"""How long the Python worker goes on for a client that is gone; less than a block's warm-up."""

GRID = [
    Cell(streams, each, step)
    for step in (10, 0)
    for each in (False, True)
    for streams in (1, 64, 256)
]
QUICK_GRID = [
    Cell(1, False, 10),
    Cell(64, False, 10),
    Cell(64, True, 10),
    Cell(64, False, 0),
]


def figures_of(results: dict[Cell, Blocks[Reading]]) -> list[Figure]:
    """The figures by which runs are compared."""
    single, shared, each = Cell(1, False, 10), Cell(64, False, 10), Cell(64, True, 10)
    figures: list[Figure] = []

    def add(name: str, cell: Cell, case: str, of: Callable[[Reading], float]) -> None:
        add_figure(figures, name, results.get(cell), case, of)

    for case, prefix in (("router", "added"), ("envoy", "envoy")):
        add(f"{prefix}_first_token_p50_ms", single, case, lambda r: r.first_p50_ms)
        add(f"{prefix}_first_token_p99_ms", single, case, lambda r: r.first_p99_ms)
    for case in ("router", "envoy"):
        add(f"{case}_cpu_us_per_token", shared, case, lambda r: r.token_cpu_us)
        add(f"{case}_cpu_us_per_token_each", each, case, lambda r: r.token_cpu_us)
        add(f"{case}_cpu_us_per_request", shared, case, lambda r: r.request_cpu_us)
        add(f"{case}_rss_mib", shared, case, lambda r: r.rss_mib)
        add(f"{case}_tokens_per_s", Cell(64, False, 0), case, lambda r: r.tokens_per_s)
    return figures


@dataclass(frozen=True)
class Pace:
    """How the Python worker's steps follow one another."""

    name: str
    engine: str
    """Arguments of the engine sim."""
    figure: str


PACES = (
    Pace("10 ms a step", "profile=step-10ms", "worker_cpu_us_per_token"),
    Pace("no pause", "speed=inf", "worker_cpu_us_per_token_no_pause"),
)


def attach_command(bench: Bench, port: int, pid: int, warm_up: float, window: float) -> list[str]:
    """A raw Attach client that keeps 64 streams running, and watches the worker."""
    return [
        *(str(bench.testkit), "attach-load", "--target", f"127.0.0.1:{port}"),
        *("--streams", "64", "--max-tokens", str(WORKER_TOKENS), "--watch-pid", str(pid)),
        *("--warm-up", str(warm_up), "--window", str(window)),
    ]


def start_python_worker(bench: Bench, command: Sequence[str], pace: Pace) -> Target:
    """Starts a Python worker and waits until it takes a session."""
    port = free_port()
    filled = [part.format(port=port, engine=pace.engine) for part in command]
    process = bench.start(filled, bench.router_core)
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise SystemExit(f"{filled!r} ended with {process.returncode}")
        try:
            bench.run(attach_command(bench, port, process.pid, 0.2, 0.2))
            return Target(port, process.pid)
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                raise SystemExit(f"{filled!r} takes no session") from None
            time.sleep(0.2)


def measure_worker(bench: Bench, command: Sequence[str], rounds: int) -> Blocks[dict[str, Any]]:
    """The Python worker behind a raw Attach client, paced and not."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for pace in PACES:
        worker = start_python_worker(bench, command, pace)
        assert worker.pid is not None
        timed = attach_command(
            bench, worker.port, worker.pid, bench.seconds.warm_up, bench.seconds.flow
        )
        cases[pace.name] = lambda timed=timed: bench.run(timed)  # type: ignore[misc]
    return alternate(cases, rounds, lambda: bench.pids)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="What does a router cost a stream?")
    parser.add_argument("--quick", action="store_true", help="under a minute; not evidence")
    parser.add_argument("--rounds", type=int, help="blocks of each case (default 3, quick 1)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--testkit", type=Path, help="binary; default: built from here")
    parser.add_argument("--router", type=Path, help="binary; default: built from here")
    parser.add_argument("--envoy", type=Path, help="Envoy's binary")
    parser.add_argument("--parts", choices=PARTS, help="only this table; default: all")
    parser.add_argument("--without", action="append", default=[], choices=CASES, help="leave out")
    parser.add_argument(
        "--worker-command",
        help="starts the Python worker; {port} and {engine} are replaced",
        default=f"{sys.executable} -m kvmesh.cli worker --role both --engine sim "
        f"--kv-pool-tokens {80 * WORKER_TOKENS} --listen 127.0.0.1:{{port}} "
        f"--orphan-ttl {ORPHAN_TTL} "
        "--engine-arguments {engine}",
    )
    return parser.parse_args()


CASES = ("router", "envoy", "worker")
PARTS = ("streams", "worker")


def main() -> None:
    """Runs the benchmark."""
    options = arguments()
    rounds = options.rounds or (1 if options.quick else 3)
    seconds = Seconds(0.8, 1.0, 0.4) if options.quick else Seconds(3.0, 3.0, 1.0)
    testkit = options.testkit or build("kvmesh-testkit")[0]
    results: dict[Cell, Blocks[Reading]] = {}
    figures: list[Figure] = []
    measured: list[Blocks[Any]] = []
    with Bench(testkit.resolve(), seconds) as bench:
        if options.parts != "worker":
            results = measure_streams(bench, options, rounds)
            figures += figures_of(results)
            measured += results.values()
        if options.parts != "streams" and "worker" not in options.without:
            worker = measure_worker(bench, options.worker_command.split(), rounds)
            figures += show_worker(worker)
            measured.append(worker)
    print_table("Figures", ["name", "value", "unit"], [[f.name, f.value, f.unit] for f in figures])
    more = say_evidence(measured, quick=options.quick)
    if options.json is not None:
        write_json(options.json, figures, **more, blocks=blocks_of(results))


def measure_streams(
    bench: Bench, options: argparse.Namespace, rounds: int
) -> dict[Cell, Blocks[Reading]]:
    """The first table: streams through a router, through Envoy and directly."""
    router = options.router
    if router is None and "router" not in options.without:
        router = build("kvmesh-router")[0]
    envoy = None if "envoy" in options.without else find_envoy(options.envoy)
    if envoy is None:
        print("Envoy is left out" if "envoy" in options.without else "Envoy is not installed")
    targets: dict[tuple[str, int], Target] = {}
    results: dict[Cell, Blocks[Reading]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for step in (10, 0):
            mock = bench.mock_worker(step)
            targets["direct", step] = Target(mock.direct, None)
            bench.wait_ready(targets["direct", step])
            if "router" not in options.without:
                targets["router", step] = start_router(bench, router, mock.port)
            if envoy is not None:
                targets["envoy", step] = start_envoy(bench, envoy, mock.direct, Path(folder))
        for cell, blocks in measure(bench, targets, QUICK_GRID if options.quick else GRID, rounds):
            results[cell] = blocks
            rows += [row(cell, case, blocks) for case in blocks.results]
            print(f"{cell}: done, {blocks.repeated} blocks repeated", file=sys.stderr)
    print_table("Streams through a router and directly", HEAD, rows)
    return results


def show_worker(blocks: Blocks[dict[str, Any]]) -> list[Figure]:
    """Prints the second table; gives its figures."""
    rows, figures = [], []
    for pace in PACES:
        for reading in blocks.results[pace.name]:
            cpu = reading["watched"]["cpu_us_per_token"]
            rows.append(
                [
                    *(pace.name, reading["tokens_per_s"], reading["tokens_per_frame"], cpu),
                    *(cpu * reading["tokens_per_frame"], reading["watched"]["rss_mib"]),
                ]
            )
        value = blocks.median(pace.name, lambda r: r["watched"]["cpu_us_per_token"])
        figures.append(Figure(pace.figure, value, "us", "lower"))
    head = ["steps", "tokens/s", "tokens/frame", "CPU us/token", "CPU us/frame", "RSS MiB"]
    print_table("Python worker (sim), 64 streams, raw Attach client", head, rows)
    return figures


if __name__ == "__main__":
    main()
